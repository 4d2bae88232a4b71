"""Base of the implementations of LoRA: what each builds, and which cases it runs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.lora.problem import Adapter, LoRA
from bench.measure import machine
from bench.measure.case import FORWARD
from bench.measure.machine import DTYPES
from bench.measure.peer import MissingOperation, Peer, SkippedCase

# From so many FLOPs on, torch's bf16 takes long on a CPU without bf16 instructions.
SLOW_FLOPS = 1e10


class Model(NamedTuple):
    """A function of x with its tensors."""

    call: Callable[[torch.Tensor], Any]  # returns y, or the projections' ys
    frozen: list[torch.Tensor]
    trained: Sequence[torch.Tensor] = ()  # A, B (and DoRA's magnitude) of each projection


def copy_parameters(
    adapter: Adapter, dtype: torch.dtype, squeeze: bool = True
) -> list[torch.Tensor]:
    """Return copies to train; `squeeze` removes the dimension of the adapters."""
    a, b, magnitude = adapter
    tensors = [a[0], b[0], magnitude] if squeeze else [a, b, magnitude]
    return [t.to(dtype, copy=True).requires_grad_() for t in tensors if t is not None]


class LoRAPeer(Peer):
    """Base class of the implementations of LoRA."""

    has_16bit_adapters = False  # adapters in x's dtype, not in float32

    def adapter_dtype(self, problem: LoRA) -> torch.dtype:
        return DTYPES[problem.dtype] if self.has_16bit_adapters else torch.float32

    def solves(self, problem: LoRA) -> LoRA:
        """Return the problem that it solves when it is given this one."""
        return problem

    def build(self, problem: LoRA) -> Model:
        raise NotImplementedError

    def masks(self, problem: LoRA) -> list[torch.Tensor]:
        """Draw the dropout of the next forward from torch's generator, as nn.Dropout does."""
        ones = torch.ones(
            problem.m, problem.size[1], dtype=self.adapter_dtype(problem), device=problem.device
        )
        keep = 1 - problem.dropout
        return [(F.dropout(ones, problem.dropout) != 0) / keep for _ in range(problem.projections)]


def check_16bit(problem: LoRA) -> None:
    """Raise MissingOperation in float32, where a peer would be the same as another one."""
    if problem.dtype == "fp32":
        raise MissingOperation


def check_not_slow(peer: Peer, problem: LoRA) -> None:
    """Raise SkippedCase for torch's bf16 backward on a CPU without bf16 instructions.

    Of 512 rows it takes a minute; torch's float32 is the opponent there.
    """
    is_bf16 = problem.device == "cpu" and problem.dtype == "bf16" and not peer.dtype
    if (
        is_bf16
        and problem.step != FORWARD
        and problem.flops > SLOW_FLOPS
        and not machine.has_fast_bf16()
    ):
        raise SkippedCase("up to a minute a call, without bf16 instructions: not run")


def reason_against_float32(device: str) -> str | None:
    """Return why the float32 peers are of no use; they are only where bf16 is slow."""
    if device != "cpu":
        return "no use for it on a GPU"
    return "no use for it: this CPU has bf16 products" if machine.has_fast_bf16() else None
