"""The LoRA layers to compare with: each builds a `Model` of what it is to solve, in memory of its own."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import pyfast
from bench.lora.problem import SCALING, Adapter, LoRA, adapter_ids, adapters
from bench.measure import machine
from bench.measure.case import FORWARD
from bench.measure.machine import DTYPES
from bench.measure.peer import Lacks, Peer, Skip, by_name, load
from bench.nf4.peers import BitsAndBytes, Layer, tensors
from pyfast.ops import lora, lora_arguments

LARGE = 1e10  # FLOPs


class Model(NamedTuple):
    call: Callable[[torch.Tensor], Any]  # x to y, or to the projections' ys
    frozen: list[torch.Tensor]
    trained: Sequence[torch.Tensor] = ()  # A, B (and DoRA's magnitude) of each projection


def _parameters(adapter: Adapter, dtype: torch.dtype, squeeze: bool = True) -> list[torch.Tensor]:
    """Copies to train; without the dimension of the adapters unless there are several."""
    a, b, magnitude = adapter
    tensors = [a[0], b[0], magnitude] if squeeze else [a, b, magnitude]
    return [t.to(dtype, copy=True).requires_grad_() for t in tensors if t is not None]


class LoRAPeer(Peer):
    narrow = False  # adapters in x's dtype, not in float32

    def adapter_dtype(self, problem: LoRA) -> torch.dtype:
        return DTYPES[problem.dtype] if self.narrow else torch.float32

    def solves(self, problem: LoRA) -> LoRA:
        """The problem that it solves when it is given this one."""
        return problem

    def build(self, problem: LoRA) -> Model:
        raise NotImplementedError

    def masks(self, problem: LoRA) -> list[torch.Tensor]:
        """The dropout of its next forward, if that draws from torch's generator as it is now: nn.Dropout's."""
        ones = torch.ones(
            problem.m, problem.size[1], dtype=self.adapter_dtype(problem), device=problem.device
        )
        keep = 1 - problem.dropout
        return [(F.dropout(ones, problem.dropout) != 0) / keep for _ in range(problem.projections)]


class PyFast(LoRAPeer):
    """Adapters in float32, as PEFT's by default."""

    name = "pyfast"

    def build(self, problem):
        layer, count = problem.layer, problem.projections
        weights = [
            copy.deepcopy(layer.packed if problem.base == "nf4" else layer.dense)
            for _ in range(count)
        ]
        frozen = [t for w in weights for t in (w.state if problem.base == "nf4" else [w])]
        found = adapters(problem)
        trained = [
            _parameters(adapter, self.adapter_dtype(problem), problem.adapters == 1)
            for adapter in found
        ]
        flat = [t for own in trained for t in own]
        if problem.adapters > 1:
            return Model(self._multi(problem, weights[0], *flat), frozen, flat)
        squares = [lora.row_squares(w) if problem.dora else None for w in weights]
        frozen += [t for t in squares if t is not None]
        projections = [
            lora_arguments.Projection(
                w, a, b, SCALING, magnitude=m[0] if m else None, row_squares=q
            )
            for w, (a, b, *m), q in zip(weights, trained, squares)
        ]
        return Model(self._single(problem, projections), frozen, flat)

    def _single(self, problem, projections):
        return lambda x: lora.lora_linears(x, projections, dropout_p=problem.dropout)

    def _multi(self, problem, weight, a, b):
        ids, scaling = (
            adapter_ids(problem),
            torch.full((problem.adapters,), SCALING, device=problem.device),
        )
        return lambda x: lora.multi_lora_linear(x, weight, a, b, adapter_ids=ids, scaling=scaling)

    def masks(self, problem):
        seeds = torch.randint(2**63 - 1, (problem.projections,), device=problem.device)
        rows, cols = problem.m, problem.size[1]
        mask = pyfast.reference.dropout_mask
        return [mask(rows, cols, problem.dropout, int(seed), problem.device) for seed in seeds]


class PyFastPlain(PyFast):
    """LoRA for DoRA, one call for each projection, one adapter for all rows."""

    name = "pyfast-plain"

    def solves(self, problem):
        if not problem.dora and problem.projections == problem.adapters == 1:
            raise Lacks
        return problem.but(dora=False, adapters=1)

    def _single(self, problem, projections):
        return lambda x: [
            lora.lora_linears(x, [p], dropout_p=problem.dropout)[0] for p in projections
        ]


class Frozen(LoRAPeer):
    """The dense layer alone, its weight frozen: the backward gives dX."""

    name = "frozen"

    def solves(self, problem):
        _skip_a_minute(self, problem)
        return problem.but(rank=0, dropout=0.0, dora=False, adapters=1)

    def build(self, problem):
        dtype = self.dtype or DTYPES[problem.dtype]
        weights = [problem.layer.dense.to(dtype, copy=True) for _ in range(problem.projections)]
        return Model(lambda x: [F.linear(x, w) for w in weights], weights)


def _narrow_only(problem: LoRA) -> None:
    """A peer that differs from another one only where x is of 16 bits."""
    if problem.dtype == "fp32":
        raise Lacks


def _skip_a_minute(peer: Peer, problem: LoRA) -> None:
    """That is what torch's bf16 backward of 512 rows takes; its float32 is the opponent there."""
    bf16 = problem.device == "cpu" and problem.dtype == "bf16" and not peer.dtype
    if bf16 and problem.step != FORWARD and problem.flops > LARGE and not machine.fast_bf16():
        raise Skip("up to a minute a call, without bf16 instructions: not run")


def _slow_bf16_only(device: str) -> str | None:
    if device != "cpu":
        return "no use for it on a GPU"
    return "no use for it: this CPU has bf16 products" if machine.fast_bf16() else None


class FrozenFloat32(Frozen):
    name = "frozen-fp32"
    dtype = torch.float32

    def missing(self, device):
        return _slow_bf16_only(device)

    def solves(self, problem):
        _narrow_only(problem)
        return super().solves(problem)


class _Projections(nn.Module):
    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


class PEFT(LoRAPeer):
    """Its layers around nn.Linear; adapters in float32, its default. Batches of several adapters it only infers."""

    name = module = "peft"
    base = "dense"

    def solves(self, problem):
        if problem.base != self.base or problem.adapters > 1:
            raise Lacks
        if self.dtype or self.narrow:
            _narrow_only(problem)
        _skip_a_minute(self, problem)
        return problem

    def _linear(self, layer: Layer) -> nn.Module:
        rows, cols = layer.packed.shape
        module = nn.Linear(cols, rows, bias=False, device="meta")
        weight = layer.dense.to(self.dtype or layer.source.dtype, copy=True)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    def _frozen(self, module: nn.Module) -> list[torch.Tensor]:
        return [module.weight]

    def build(self, problem):
        peft = load("peft")
        model = _Projections([self._linear(problem.layer) for _ in range(problem.projections)])
        model.is_loaded_in_4bit = self.base == "nf4"
        frozen = [t for module in model.layers for t in self._frozen(module)]
        config = peft.LoraConfig(
            r=problem.rank,
            lora_alpha=SCALING * problem.rank,
            lora_dropout=problem.dropout,
            use_dora=problem.dora,
            target_modules=r"layers\.\d+",
        )
        peft.get_peft_model(model, config, autocast_adapter_dtype=not self.narrow)
        trained = []
        for module, adapter in zip(model.layers, adapters(problem)):
            own = [module.lora_A["default"].weight, module.lora_B["default"].weight]
            own += [module.lora_magnitude_vector["default"].weight] if problem.dora else []
            for parameter, value in zip(own, _parameters(adapter, self.adapter_dtype(problem))):
                parameter.data = value.detach()
            trained += own
        return Model(model.train(), frozen, trained)


class PEFT16(PEFT):
    """Adapters in x's dtype."""

    name = "peft-16bit"
    narrow = True


class PEFTFloat32(PEFT):
    """All in float32."""

    name = "peft-fp32"
    dtype = torch.float32

    def missing(self, device):
        return _slow_bf16_only(device) or super().missing(device)


class PEFT4Bit(PEFT):
    """Its layers around bitsandbytes' Linear4bit."""

    name = "peft-bnb"
    base = "nf4"

    def missing(self, device):
        return super().missing(device) or BitsAndBytes().missing(device)

    def _linear(self, layer):
        return BitsAndBytes().linear4bit(layer)

    def _frozen(self, module):
        return tensors(module.weight, module.weight.quant_state)


class PEFT4Bit16(PEFT4Bit):
    name = "peft-bnb-16bit"
    narrow = True


class Unsloth(LoRAPeer):
    """Its `LoRA_W`, for which x has three dimensions."""

    name = "unsloth"
    module = "unsloth.kernels.fast_lora"

    def solves(self, problem):
        if problem.dora or problem.dropout or problem.projections > 1 or problem.adapters > 1:
            raise Lacks
        return problem

    def build(self, problem):
        apply = load(self.module).LoRA_W.apply
        weight, state = problem.layer.dense.clone(), None
        frozen = [weight]
        if problem.base == "nf4":
            weight, state = BitsAndBytes().state(problem.layer)
            frozen = [weight, *copy.deepcopy(problem.layer.packed.state[1:])]
        a, b = _parameters(adapters(problem)[0], self.adapter_dtype(problem))
        return Model(lambda x: apply(x[None], weight, state, a, b, SCALING)[0], frozen, [a, b])


PEERS = by_name(
    *(PyFast(), PyFastPlain(), Frozen(), FrozenFloat32()),
    *(PEFT(), PEFT16(), PEFTFloat32(), PEFT4Bit(), PEFT4Bit16(), Unsloth()),
)
