"""Bottleneck adapters: forward, and forward and backward with all gradients.

The shape is width x bottleneck; M are rows of x.
"""

import functools
import itertools

import torch.nn.functional as F

import pyfast
from bench.measure.case import BOTH, FORWARD, Case, Made, differentiate
from bench.measure.peer import Peer, by_name
from bench.report.goals import At, Speed

BUDGET = {"quick": 25, "full": 400}  # seconds
SHAPES = {
    f"{width}x{b}": model
    for width, model in ((768, "BERT-base"), (4096, "Llama-3-8B"))
    for b in (16, 64, 256)
}
SIZES = {
    "cpu quick": {"shapes": ["768x64"], "m": [1, 512]},
    "cuda quick": {"shapes": ["768x64", "4096x64"], "m": [1, 512, 4096]},
    "full": {"shapes": SHAPES, "m": [1, 64, 512, 4096]},
}
SCALING = 0.5


def plain(x, down, down_bias, up, up_bias):
    return x + SCALING * F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


class PyFast(Peer):
    name = "pyfast"
    function = staticmethod(functools.partial(pyfast.adapter, activation="gelu", scaling=SCALING))


class Torch(Peer):
    name = "torch"
    function = staticmethod(plain)


PEERS = by_name(PyFast(), Torch())


class Adapter(Case):
    op = property(lambda self: "adapter" if self.step == FORWARD else "adapter fwd+bwd")
    parts = property(lambda self: () if self.step == FORWARD else ("adapter",))

    @property
    def flops(self):
        width, bottleneck = self.size
        return 4.0 * self.m * width * bottleneck * (1 if self.step == FORWARD else 3)

    def tensors(self):
        """x, the parameters, and dy."""
        w, b = self.size
        sizes = ((self.m, w), (b, w), (b,), (w, b), (w,), (self.m, w))
        scales = (1, w**-0.5, 1, b**-0.5, 1, 1)
        return [
            self.normal(seed, *size) * scale
            for seed, (size, scale) in enumerate(zip(sizes, scales))
        ]

    def make(self, peer):
        x, *parameters, dy = self.tensors()
        for parameter in parameters:
            parameter.requires_grad_()
        return Made(lambda x: peer.function(x, *parameters), [x], [dy], parameters, parameters)

    def define(self, dtype):
        *given, dy = (t.to(dtype) for t in self.tensors())
        return differentiate(plain, given, [dy])


def cases(args):
    for where in itertools.product(args.shapes, args.dtype, [args.device]):
        yield from (Adapter(*where, m, step) for step in (FORWARD, BOTH) for m in args.m)


EACH = [At(op, shape, 512) for op in ("adapter", "adapter fwd+bwd") for shape in SHAPES]
GOALS = {device: [Speed(at, ">=", 1, "torch") for at in EACH] for device in ("cpu", "cuda")}
