"""Bottleneck adapters: forward, and forward and backward with all gradients.

The shape is width x bottleneck; M is the number of rows of x.
"""

import functools
import itertools

import torch.nn.functional as F

import pyfast
from bench.measure.case import BOTH, FORWARD, Case, Instance, differentiate
from bench.measure.peer import Peer, index_by_name
from bench.report.goals import CaseName, Speed

BUDGET = {"quick": 25, "full": 400}  # seconds
MODELS = {768: "BERT-base", 4096: "Llama-3-8B"}  # by width
SHAPES = {
    f"{width}x{bottleneck}": model
    for width, model in MODELS.items()
    for bottleneck in (16, 64, 256)
}
SIZES = {
    "cpu quick": {"shapes": ["768x64"], "m": [1, 512]},
    "cuda quick": {"shapes": ["768x64", "4096x64"], "m": [1, 512, 4096]},
    "full": {"shapes": SHAPES, "m": [1, 64, 512, 4096]},
}
SCALING = 0.5


def plain_adapter(x, down, down_bias, up, up_bias):
    """Apply the adapter in plain torch."""
    return x + SCALING * F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


class PyFast(Peer):
    name = "pyfast"
    function = staticmethod(functools.partial(pyfast.adapter, activation="gelu", scaling=SCALING))


class Torch(Peer):
    name = "torch"
    function = staticmethod(plain_adapter)


PEERS = index_by_name(PyFast(), Torch())


class Adapter(Case):
    """One adapter, applied to M rows."""

    op = property(lambda self: "adapter" if self.step == FORWARD else "adapter fwd+bwd")
    parts = property(lambda self: () if self.step == FORWARD else ("adapter",))

    @property
    def flops(self):
        width, bottleneck = self.size
        return 4.0 * self.m * width * bottleneck * (1 if self.step == FORWARD else 3)

    def draw_tensors(self):
        """Return x, the parameters, and dy."""
        width, bottleneck = self.size
        sizes = (
            (self.m, width),
            (bottleneck, width),
            (bottleneck,),
            (width, bottleneck),
            (width,),
            (self.m, width),
        )
        scales = (1, width**-0.5, 1, bottleneck**-0.5, 1, 1)
        return [
            self.draw_normal(seed, *size) * scale
            for seed, (size, scale) in enumerate(zip(sizes, scales))
        ]

    def make(self, peer):
        x, *parameters, dy = self.draw_tensors()
        for parameter in parameters:
            parameter.requires_grad_()
        return Instance(lambda x: peer.function(x, *parameters), [x], [dy], parameters, parameters)

    def define(self, dtype):
        *arguments, dy = (t.to(dtype) for t in self.draw_tensors())
        return differentiate(plain_adapter, arguments, [dy])


def cases(args):
    """Yield the cases, forwards first."""
    for base in itertools.product(args.shapes, args.dtype, [args.device]):
        yield from (Adapter(*base, m, step) for step in (FORWARD, BOTH) for m in args.m)


AT_512_ROWS = [
    CaseName(op, shape, 512) for op in ("adapter", "adapter fwd+bwd") for shape in SHAPES
]
GOALS = {
    device: [Speed(case, ">=", 1, "torch") for case in AT_512_ROWS] for device in ("cpu", "cuda")
}
