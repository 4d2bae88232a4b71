"""Implementations of LoRA that are compared.

Each builds a `Model` of the problem that it is to solve, with tensors of its own.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import pyfast
from bench.lora.peer import (
    LoRAPeer,
    Model,
    check_16bit,
    check_not_slow,
    copy_parameters,
    reason_against_float32,
)
from bench.lora.problem import SCALING, draw_adapter_ids, draw_adapters
from bench.measure.machine import DTYPES
from bench.measure.peer import MissingOperation, index_by_name, load_module
from bench.nf4.layer import Layer
from bench.nf4.peers import BitsAndBytes, held_tensors
from pyfast.ops import dora, lora, lora_arguments


class PyFast(LoRAPeer):
    """Adapters in float32, as PEFT's by default."""

    name = "pyfast"

    def build(self, problem):
        is_nf4 = problem.base == "nf4"
        weight = problem.layer.packed if is_nf4 else problem.layer.dense
        weights = [copy.deepcopy(weight) for _ in range(problem.projections)]
        frozen = [t for w in weights for t in (w.state if is_nf4 else [w])]
        trained = [
            copy_parameters(adapter, self.adapter_dtype(problem), problem.adapters == 1)
            for adapter in draw_adapters(problem)
        ]
        flat = [t for parameters in trained for t in parameters]
        if problem.adapters > 1:
            return Model(self._multi(problem, weights[0], *flat), frozen, flat)
        squares = [dora.row_squares(w) if problem.dora else None for w in weights]
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
        ids = draw_adapter_ids(problem)
        scaling = torch.full((problem.adapters,), SCALING, device=problem.device)
        return lambda x: lora.multi_lora_linear(x, weight, a, b, adapter_ids=ids, scaling=scaling)

    def masks(self, problem):
        seeds = torch.randint(2**63 - 1, (problem.projections,), device=problem.device)
        rows, cols = problem.m, problem.size[1]
        mask = pyfast.reference.dropout_mask
        return [mask(rows, cols, problem.dropout, int(seed), problem.device) for seed in seeds]


class PyFastPlain(PyFast):
    """The simpler method: LoRA for DoRA, a call for each projection, one adapter for all rows."""

    name = "pyfast-plain"

    def solves(self, problem):
        if not problem.dora and problem.projections == problem.adapters == 1:
            raise MissingOperation
        return problem.copy_with(dora=False, adapters=1)

    def _single(self, problem, projections):
        return lambda x: [
            lora.lora_linears(x, [p], dropout_p=problem.dropout)[0] for p in projections
        ]


class Frozen(LoRAPeer):
    """The dense layer alone, its weight frozen: the backward gives dX."""

    name = "frozen"

    def solves(self, problem):
        check_not_slow(self, problem)
        return problem.copy_with(rank=0, dropout=0.0, dora=False, adapters=1)

    def build(self, problem):
        dtype = self.dtype or DTYPES[problem.dtype]
        weights = [problem.layer.dense.to(dtype, copy=True) for _ in range(problem.projections)]
        return Model(lambda x: [F.linear(x, w) for w in weights], weights)


class FrozenFloat32(Frozen):
    """The dense layer in float32."""

    name = "frozen-fp32"
    dtype = torch.float32

    def missing_reason(self, device):
        return reason_against_float32(device)

    def solves(self, problem):
        check_16bit(problem)
        return super().solves(problem)


class _Projections(nn.Module):
    """Layers that share x."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


class PEFT(LoRAPeer):
    """PEFT's layers around nn.Linear, with adapters in float32, its default.

    Batches of several adapters PEFT only infers.
    """

    name = module = "peft"
    base = "dense"

    def solves(self, problem):
        if problem.base != self.base or problem.adapters > 1:
            raise MissingOperation
        if self.dtype or self.has_16bit_adapters:
            check_16bit(problem)
        check_not_slow(self, problem)
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
        peft = load_module("peft")
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
        peft.get_peft_model(model, config, autocast_adapter_dtype=not self.has_16bit_adapters)
        trained = []
        for module, adapter in zip(model.layers, draw_adapters(problem)):
            parameters = [module.lora_A["default"].weight, module.lora_B["default"].weight]
            if problem.dora:
                parameters.append(module.lora_magnitude_vector["default"].weight)
            values = copy_parameters(adapter, self.adapter_dtype(problem))
            for parameter, value in zip(parameters, values):
                parameter.data = value.detach()
            trained += parameters
        return Model(model.train(), frozen, trained)


class PEFT16(PEFT):
    """PEFT with adapters in x's dtype."""

    name = "peft-16bit"
    has_16bit_adapters = True


class PEFTFloat32(PEFT):
    """PEFT with everything in float32."""

    name = "peft-fp32"
    dtype = torch.float32

    def missing_reason(self, device):
        return reason_against_float32(device) or super().missing_reason(device)


class PEFT4Bit(PEFT):
    """PEFT's layers around bitsandbytes' Linear4bit."""

    name = "peft-bnb"
    base = "nf4"

    def missing_reason(self, device):
        return super().missing_reason(device) or BitsAndBytes().missing_reason(device)

    def _linear(self, layer):
        return BitsAndBytes().linear4bit(layer)

    def _frozen(self, module):
        return held_tensors(module.weight, module.weight.quant_state)


class PEFT4Bit16(PEFT4Bit):
    """PEFT over bitsandbytes, with adapters in x's dtype."""

    name = "peft-bnb-16bit"
    has_16bit_adapters = True


class Unsloth(LoRAPeer):
    """unsloth's `LoRA_W`, which takes x with three dimensions."""

    name = "unsloth"
    module = "unsloth.kernels.fast_lora"

    def solves(self, problem):
        if problem.dora or problem.dropout or problem.projections > 1 or problem.adapters > 1:
            raise MissingOperation
        return problem

    def build(self, problem):
        apply = load_module(self.module).LoRA_W.apply
        weight, state = problem.layer.dense.clone(), None
        frozen = [weight]
        if problem.base == "nf4":
            weight, state = BitsAndBytes().quant_state(problem.layer)
            frozen = [weight, *copy.deepcopy(problem.layer.packed.state[1:])]
        a, b = copy_parameters(draw_adapters(problem)[0], self.adapter_dtype(problem))
        return Model(lambda x: apply(x[None], weight, state, a, b, SCALING)[0], frozen, [a, b])


PEERS = index_by_name(
    *(PyFast(), PyFastPlain(), Frozen(), FrozenFloat32()),
    *(PEFT(), PEFT16(), PEFTFloat32(), PEFT4Bit(), PEFT4Bit16(), Unsloth()),
)
