"""Bottleneck adapters: forward, and forward and backward with all gradients."""

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import pyfast
from bench import harness, peers
from bench.machine import DTYPES
from bench.peers import Peer, nbytes
from bench.report import Goal

QUICK, FULL = ["768x64"], ["768x16", "768x64", "768x256", "4096x16", "4096x64", "4096x256"]
QUICK_M, FULL_M = [1, 512], [1, 64, 512, 4096]
OPS = ("adapter", "adapter fwd+bwd")
PEERS = {name: peers.ALL[name] for name in ("pyfast", "torch")}
BUDGET = {True: 40, False: 400}  # seconds, quick and full
SCALING = 0.5


def plain(x, down, down_bias, up, up_bias):
    return x + SCALING * F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)


def function_of(peer: Peer) -> Callable:
    if peer.name == "pyfast":
        return functools.partial(pyfast.adapter, activation="gelu", scaling=SCALING)
    return plain


class AdapterCase(harness.Case):
    def __init__(self, op: str, m: int, shape: str, dtype: str, device: str):
        self.op, self.m, self.shape, self.dtype, self.device = op, m, shape, dtype, device
        self.width, self.bottleneck = map(int, shape.split("x"))
        self.parts = ("adapter",) if op != "adapter" else ()
        self.flops = 4.0 * m * self.width * self.bottleneck * (1 if op == "adapter" else 3)

    def tensors(self) -> list[torch.Tensor]:
        """x, the parameters, and dy."""
        generator = torch.Generator().manual_seed(0)
        w, b = self.width, self.bottleneck
        shapes = ((self.m, w), (b, w), (b,), (w, b), (w,), (self.m, w))
        scales = (1, w**-0.5, 1, b**-0.5, 1, 1)
        values = (torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales))
        return [v.to(self.device, DTYPES[self.dtype]) for v in values]

    def _result(self, function: Callable, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The output, or, after a backward, the gradients of all in one row."""
        *given, dy = tensors
        if self.op == "adapter":
            with torch.no_grad():
                return function(*given)
        grads = torch.autograd.grad(function(*given), given, dy)
        return torch.cat([grad.reshape(-1) for grad in grads])

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        return self._result(plain, self._leaves(torch.float64))

    def _leaves(self, dtype: torch.dtype) -> list[torch.Tensor]:
        *given, dy = (t.to(dtype, copy=True) for t in self.tensors())
        return [*(t.requires_grad_() for t in given), dy]

    @functools.cached_property
    def limit(self) -> float:
        torchs = self._result(plain, self._leaves(DTYPES[self.dtype]))
        return 2 * harness.relative_error(torchs, self.reference) + 1e-6

    def build(self, peer: Peer) -> harness.Trial:
        function, dtype = function_of(peer), DTYPES[self.dtype]
        *given, _ = self.tensors()
        # Forward: x and the parameters in, y out. Backward: those and dy in, a gradient for each out.
        moved = nbytes(*given, given[0]) + (0 if self.op == "adapter" else 2 * nbytes(*given) + nbytes(given[0]))
        count = harness.rotation(moved, self.device)
        sets = [self._leaves(dtype) for _ in range(count)]
        return harness.Trial([functools.partial(self._call, function, s) for s in sets], moved, nbytes(*given[1:]))

    def _call(self, function: Callable, tensors: list[torch.Tensor]):
        *given, dy = tensors
        if self.op == "adapter":
            with torch.no_grad():
                return function(*given)
        return torch.autograd.grad(function(*given), given, dy)

    def error(self, peer: Peer, result) -> float:
        if isinstance(result, tuple):
            result = torch.cat([grad.reshape(-1) for grad in result])
        return harness.relative_error(result, self.reference)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", help="WIDTHxBOTTLENECK,...")
    parser.add_argument("--m", help="rows of x, 1,64,...")


def cases(args: argparse.Namespace) -> list[harness.Case]:
    shapes = args.shapes.split(",") if args.shapes else QUICK if args.quick else FULL
    sizes = sorted(map(int, args.m.split(","))) if args.m else QUICK_M if args.quick else FULL_M
    where = [(shape, dtype) for shape in shapes for dtype in args.dtype]
    return [AdapterCase(op, m, *place, args.device) for place in where for op in OPS for m in sizes]


def goals(rows: list[harness.Row], device: str) -> list[Goal]:
    """Faster than plain torch at 512 rows."""
    found = []
    for row in rows:
        if row.impl == "torch" and row.m == 512 and row.times_pyfast:
            name = f"{row.op} {row.shape} {row.dtype} M=512: {{:.2f}}x as fast as torch"
            found.append(Goal(name, ">=", 1.0, row.times_pyfast))
    return found
