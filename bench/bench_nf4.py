"""NF4 weights: quantise, dequantise, and the linear layer forward, backward and both."""

import argparse
import functools
import math

import torch
import torch.nn.functional as F

from bench import harness, peers
from bench.goals import Goals
from bench.machine import DTYPES
from bench.peers import Lacks, Layer, Peer, activation, layer, nbytes
from bench.report import Goal

PEERS = peers.ALL
BUDGET = {True: 120, False: 1200}  # seconds, quick and full
QUICK_SHAPES = ["4096x4096"]
FULL_SHAPES = [*QUICK_SHAPES, "14336x4096", "4096x14336", "8192x8192"]
QUICK_M = {"cpu": [1, 16, 64, 512], "cuda": [1, 16, 64, 512, 2048, 8192]}
FULL_M = {
    "cpu": [1, 4, 16, 64, 128, 512, 2048],
    "cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192],
}
LINEAR = ("linear", "linear dX", "linear fwd+bwd")


class WeightCase(harness.Case):
    m = None
    flops = 0.0

    def __init__(self, shape: str, dtype: str, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device

    @property
    def layer(self) -> Layer:
        return layer(self.shape, self.dtype, self.device)

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        return self.layer.exact


class Quantize(WeightCase):
    op = "quantise"

    @functools.cached_property
    def limit(self) -> float:
        # The error is that of the format: how far the decoded weight is from the weight.
        return 1.02 * harness.relative_error(self.reference, self.layer.source.double())

    def build(self, peer: Peer) -> harness.Trial:
        source = self.layer.source
        call, self.decode = peer.quantize(self.layer)
        moved = nbytes(source) + nbytes(*self.layer.packed.state)
        count = harness.rotation(moved, self.device)
        calls = [call] + [peer.quantize(self.layer)[0] for _ in range(count - 1)]
        return harness.Trial(calls, moved, 0)

    def error(self, peer: Peer, result) -> float:
        return harness.relative_error(self.decode(result), self.layer.source.double())


class Dequantize(WeightCase):
    op = "dequantise"

    @functools.cached_property
    def limit(self) -> float:
        rounded = self.reference.to(DTYPES[self.dtype])
        return 2 * harness.relative_error(rounded, self.reference) + 1e-7

    def build(self, peer: Peer) -> harness.Trial:
        call, held = peer.dequantize(self.layer)
        source = self.layer.source
        moved = held + nbytes(source)
        count = harness.rotation(moved, self.device)
        calls = [call] + [peer.dequantize(self.layer)[0] for _ in range(count - 1)]
        return harness.Trial(calls, moved, held)

    def error(self, peer: Peer, result) -> float:
        return harness.relative_error(result, self.reference)


class Linear(WeightCase):
    """y = x W^T at M rows of x; dX = dY W; or one after the other."""

    def __init__(self, op: str, m: int, shape: str, dtype: str, device: str):
        super().__init__(shape, dtype, device)
        self.op, self.m = op, m
        self.parts = ("linear dX",) if op == "linear fwd+bwd" else ()
        self.rows, self.cols = map(int, shape.split("x"))
        self.flops = 2.0 * m * self.rows * self.cols * (2 if op == "linear fwd+bwd" else 1)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        where = (self.dtype, self.device)
        return activation(1, self.m, self.cols, *where), activation(2, self.m, self.rows, *where)

    def _product(self, dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
        x, dy = self.inputs()
        weight = weight.to(dtype)
        if self.op == "linear":
            return F.linear(x.to(dtype), weight)
        return dy.to(dtype) @ weight

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        return self._product(torch.float64, self.layer.exact)

    @functools.cached_property
    def limit(self) -> float:
        # Twice plain torch's own error in this dtype: rounded weight, fp32 sums, rounded result.
        plain = self._product(torch.float32, self.layer.dense).to(DTYPES[self.dtype])
        return 2 * harness.relative_error(plain, self.reference) + 1e-6

    def _call(self, peer: Peer, function):
        x, dy = (t.to(peer.dtype or t.dtype, copy=True) for t in self.inputs())
        if self.op == "linear":
            return lambda: function(x)
        x.requires_grad_()
        if self.op == "linear fwd+bwd":
            return lambda: torch.autograd.grad(function(x), x, dy)[0]
        y = function(x)
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    def build(self, peer: Peer) -> harness.Trial:
        if self.op != "linear" and not peer.trains:
            raise Lacks
        function, held = peer.linear(self.layer)
        x, dy = self.inputs()
        size = (peer.dtype or x.dtype).itemsize
        passes = 2 if self.op == "linear fwd+bwd" else 1
        moved = passes * (held + (x.numel() + dy.numel()) * size)
        calls = [self._call(peer, function)]
        for _ in range(harness.rotation(moved, self.device) - 1):
            calls.append(self._call(peer, peer.linear(self.layer)[0]))
        return harness.Trial(calls, moved, held)

    def error(self, peer: Peer, result) -> float:
        return harness.relative_error(result, self.reference)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", help="NxK,... of the weight")
    parser.add_argument("--m", help="rows of x, 1,16,...")


def cases(args: argparse.Namespace) -> list[harness.Case]:
    """Weight by weight, so that one is in memory; M ascending, so that times can be foretold."""
    default_shapes = QUICK_SHAPES if args.quick else FULL_SHAPES
    default_m = (QUICK_M if args.quick else FULL_M)[args.device]
    shapes = args.shapes.split(",") if args.shapes else default_shapes
    sizes = sorted(map(int, args.m.split(","))) if args.m else default_m
    found: list[harness.Case] = []
    for shape in shapes:
        for dtype in args.dtype:
            where = (shape, dtype, args.device)
            found += [Quantize(*where), Dequantize(*where)]
            found += [Linear(op, m, *where) for op in LINEAR for m in sizes]
    return found


class NF4Goals(Goals):
    def __init__(self, rows: list[harness.Row]):
        super().__init__(rows)
        self.sizes = sorted({key[2] for key in self.rows if key[0] == "linear"})

    def steady(self, shape, m, target):
        row, base = self.row("linear", shape, m), self.row("linear", shape, 1)
        value = row.ms_p50 / base.ms_p50 if row.ms_p50 and base.ms_p50 else None
        self.add(row, "{:.2f}x the time of M=1", "<=", target, value, row.note or base.note)

    def exact(self, shape):
        peer = self.row("dequantise", shape, None, "bnb-train")
        row = self.row("dequantise", shape, None)
        value = None if peer.same_bits is None else float(peer.same_bits)
        text = "equal to bitsandbytes, bit for bit: {:.0f}"
        self.add(row, text, ">=", 1, value, peer.note or row.note)


def _cpu_goals(found: NF4Goals) -> None:
    shape = "4096x4096"
    found.dense("linear", shape, 1, 4)
    found.speed("linear", shape, 1, "bnb-train", 30)
    found.speed("linear", shape, 1, "bnb-eval", 2)
    found.dense("linear", shape, 64, 1.2, "<=")
    found.dense("linear", shape, 512, 1.15, "<=")
    found.speed("quantise", shape, None, "bnb-train", 10)


def _gpu_goals(found: NF4Goals) -> None:
    for shape in found.shapes:
        if math.prod(map(int, shape.split("x"))) >= 14336 * 4096:
            found.bandwidth("linear", shape, 1, 80)
        for m in found.sizes:
            if 1 < m <= 16:
                found.steady(shape, m, 1.15)
        for peer in ("bnb-train", "unsloth"):
            found.speed("linear", shape, 1, peer, 1.3)
        for m in found.sizes:
            if 64 <= m <= 512:
                found.speed("linear", shape, m, "dequantize+torch", 1)
        if shape in ("4096x4096", "14336x4096"):
            found.dense("linear", shape, 512, 0.75)
        for op in ("linear", "linear dX"):
            for m, target in ((2048, 0.90), (4096, 0.93), (8192, 0.96)):
                found.dense(op, shape, m, target)
        found.exact(shape)
    found.bandwidth("dequantise", "14336x4096", None, 88)


def goals(rows: list[harness.Row], device: str) -> list[Goal]:
    found = NF4Goals(rows)
    (_cpu_goals if device == "cpu" else _gpu_goals)(found)
    return found.found
