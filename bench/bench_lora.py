"""LoRA and DoRA over dense and NF4 weights: forward, backward to x, A and B, and both; q, k, v; several adapters.

`frozen` is the dense layer without an adapter, whose backward gives dX only: what the rest comes on top of. The rate
counts its FLOPs, for all. `pyfast-plain` is LoRA where the case is DoRA, three calls where q, k and v share one, and
one adapter for all rows where there are several. The forward is that of inference; what a backward needs is `saved MB`.
"""

import argparse
import functools
import itertools

import torch

from bench import harness, lora_peers
from bench.goals import Goals
from bench.lora_peers import LoRAPeer, Model
from bench.lora_problem import Problem, define, inputs, without_dropout
from bench.machine import DTYPES
from bench.peers import nbytes
from bench.report import Goal

PEERS = lora_peers.PEERS
BUDGET = {True: 200, False: 2400}
SHAPE = "4096x4096"
STEPS = ("forward", "backward", "fwd+bwd")
BASES = ("dense", "nf4")
QUICK_M = {"cpu": [1, 64, 512], "cuda": [1, 64, 512, 8192]}
FULL_M = {"cpu": [1, 64, 512, 4096], "cuda": [1, 64, 512, 4096, 8192]}
EXTRA_M = {"cpu": [512], "cuda": [512, 8192]}  # of DoRA, q/k/v and several adapters; of dropout in a quick run
RANK, RANKS, DROPOUT = 16, [8, 16, 64], 0.05
SEED = 0


class LoRA(harness.Case):
    def __init__(self, kind: str, step: str, problem: Problem):
        self.kind, self.step, self.problem = kind, step, problem
        self.shape, self.dtype, self.m = problem.shape, problem.dtype, problem.m
        self.op = f"{kind} {problem.base} {step}"
        self.variant = f"r={problem.rank}" + (f", dropout {problem.dropout}" if problem.dropout else "")
        backward = ("backward", "fwd+bwd") if step == "fwd+bwd" else (step,)
        kinds = itertools.product(dict.fromkeys([kind, "lora"]), dict.fromkeys([problem.base, "dense"]), backward)
        self.parts = tuple(" ".join(names) for names in kinds)
        rows, cols = problem.size
        passes = 2 if step == "fwd+bwd" else 1
        self.flops = 2.0 * passes * problem.projections * self.m * rows * cols

    @functools.cached_property
    def limit(self) -> float:
        """Twice plain torch's own error in this dtype: rounded weight, fp32 sums, rounded result."""
        problem, part = self.problem.but(dropout=0.0), self.step != "forward"
        plain, right = (without_dropout(problem, dtype)[part] for dtype in (torch.float32, torch.float64))
        return 2 * max(harness.relative_error(a.to(DTYPES[self.dtype]), b) for a, b in zip(plain, right)) + 1e-6

    def _moved(self, peer: LoRAPeer, model: Model) -> int:
        x, dys = inputs(self.problem)
        ratio = (peer.dtype or x.dtype).itemsize / x.dtype.itemsize
        forward = model.held + int(ratio * nbytes(x, *dys))
        backward = forward + nbytes(*model.trained) + int(ratio * nbytes(x))
        return {"forward": forward, "backward": backward, "fwd+bwd": forward + backward}[self.step]

    def build(self, peer: LoRAPeer) -> harness.Trial:
        problem = peer.solves(self.problem)
        first = peer.build(problem)
        moved = self._moved(peer, first)
        count = harness.rotation(moved, problem.device) - 1
        steps = [_Step(peer, model, problem) for model in [first, *(peer.build(problem) for _ in range(count))]]
        saved = None
        if self.step == "fwd+bwd":
            saved = harness.saved_bytes(steps[0].forward, [*first.frozen, *first.trained])
        torch.manual_seed(SEED)  # `error` draws the same masks
        if self.step == "forward":
            return harness.Trial([step.infer for step in steps], moved, first.held)
        if self.step == "fwd+bwd":
            return harness.Trial([step.train for step in steps], moved, first.held, saved)
        return harness.Trial([step.backward(step.forward()) for step in steps], moved, first.held)

    def error(self, peer: LoRAPeer, result) -> float:
        """The largest of any output's or any gradient's."""
        problem = peer.solves(self.problem)
        if problem.dropout:
            torch.manual_seed(SEED)
            found = define(problem, peer.masks(problem), torch.float64)
        else:
            found = without_dropout(problem, torch.float64)
        pairs = zip(result, found[self.step != "forward"], strict=True)
        return max((harness.relative_error(t.reshape(right.shape), right) for t, right in pairs), key=_nan_is_largest)


def _nan_is_largest(error: float) -> float:
    return float("inf") if error != error else error


class _Step:
    """A model with an x and dYs of its own."""

    def __init__(self, peer: LoRAPeer, model: Model, problem: Problem):
        x, dys = inputs(problem)
        dtype = peer.dtype or x.dtype
        self.model, self.dys = model, [dy.to(dtype, copy=True) for dy in dys]
        self.x = x.to(dtype, copy=True).requires_grad_()
        self.leaves = [self.x, *model.trained]

    @torch.no_grad()
    def infer(self):
        return self.forward()

    def forward(self):
        found = self.model.call(self.x)
        return [found] if isinstance(found, torch.Tensor) else found

    def train(self):
        return torch.autograd.grad(self.forward(), self.leaves, self.dys)

    def backward(self, ys):
        return lambda: torch.autograd.grad(ys, self.leaves, self.dys, retain_graph=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=SHAPE, help="NxK,... of the weight")
    parser.add_argument("--m", help="rows of x, 1,64,...")
    parser.add_argument("--r", help="ranks, 8,16,...")


def cases(args: argparse.Namespace) -> list[harness.Case]:
    """M ascending, so that times can be foretold."""
    sizes = sorted(map(int, args.m.split(","))) if args.m else (QUICK_M if args.quick else FULL_M)[args.device]
    extra = sizes if args.m else EXTRA_M[args.device]
    ranks = list(map(int, args.r.split(","))) if args.r else [RANK] if args.quick else RANKS
    found: list[harness.Case] = []
    for shape, dtype, m in itertools.product(args.shapes.split(","), args.dtype, sizes):
        for base in BASES:
            where = (shape, dtype, args.device, base, m)
            rates = [0.0] if args.quick and m not in extra else [0.0, DROPOUT]
            for rank, rate, step in itertools.product(ranks, rates, STEPS):
                found.append(LoRA("lora", step, Problem(*where, rank, rate)))
            if m in extra:
                found += _others(Problem(*where, RANK if RANK in ranks else ranks[0]), args.quick)
    return found


def _others(problem: Problem, quick: bool) -> list[harness.Case]:
    kinds = {
        "dora": problem.but(dora=True),
        "qkv": problem.but(projections=3),
        "8 adapters": problem.but(adapters=8),
    }
    steps = ["fwd+bwd"] if quick else STEPS
    return [LoRA(kind, step, changed) for kind, changed in kinds.items() for step in steps]


class LoRAGoals(Goals):
    def saved(self, base: str, shape: str, m: int, variant: str) -> None:
        row = self.row(f"lora {base} fwd+bwd", shape, m, variant=variant)
        x, s, seed = 2 * m * int(shape.split("x")[1]), 4 * m * RANK, 8 * ("dropout" in variant)
        value = None if row.saved_mb is None else 1e6 * row.saved_mb / (x + s + seed)
        self.add(row, "{:.3f}x the bytes of x and S saved", "<=", 1, value, row.note)


def goals(rows: list[harness.Row], device: str) -> list[Goal]:
    found, plain, dropped = LoRAGoals(rows, torch="frozen"), f"r={RANK}", f"r={RANK}, dropout {DROPOUT}"
    for shape in found.shapes:
        if device == "cpu":
            found.dense("lora dense fwd+bwd", shape, 512, 1.15, "<=", plain)
            found.dense("lora nf4 fwd+bwd", shape, 512, 1.35, "<=", plain)
        else:
            found.dense("lora nf4 fwd+bwd", shape, 8192, 1.13, "<=", dropped)
        for m, base in itertools.product(EXTRA_M[device], BASES):
            other = (shape, m, "pyfast-plain")
            found.speed(f"dora {base} fwd+bwd", *other, 1.3 if device == "cpu" else 1.15, "<=", ": LoRA", plain)
            if device == "cpu":
                found.speed(f"8 adapters {base} fwd+bwd", *other, 1.25, "<=", ": one adapter", plain)
            found.saved(base, shape, m, dropped)
    return found.found
