"""Reversible blocks: a training step over depth, its time and memory, and what recovering the inputs gets wrong.

M is the number of blocks: pre-norm transformer blocks, causal attention and feed-forward, one example. A step is a
forward and a backward into gradients that are there, and zeroed first; memory is what it takes beside these and the
parameters. The rate counts the products of stored activations, for all. `torch` stores them, `checkpoint` keeps the
streams between blocks, `lucidrains` is reformer-pytorch's ReversibleSequence; of pyfast's `exact` the other settings
than the default of the dtype are variants. The bench extra brings revtorch and revlib; memcnn asks for a torchvision
that may not fit the torch that is installed: `pip install --no-deps memcnn`.
"""

import argparse
import contextlib
import functools
import itertools
import pathlib

import torch

from bench import harness, report, reversible_drift, reversible_peers, reversible_plots
from bench.goals import Goals
from bench.peers import Skip
from bench.report import Goal
from bench.reversible_peers import ReversiblePeer
from bench.reversible_plots import MOST, TIMED
from bench.reversible_problem import Problem, Step, definition, errors

PEERS = reversible_peers.PEERS
BUDGET = {True: 300, False: 1500}  # seconds, quick and full
DTYPE = {"cpu": "fp32,bf16", "cuda": "fp32,bf16"}
OP = "reversible fwd+bwd"
SHAPE = {"cpu": "384x512", "cuda": "1024x4096"}
QUICK_M, FULL_M = [6, 12, 48], [2, 6, 12, 24, 48]
SHALLOW, DEEP = 6, 48  # blocks, whose memory is compared
DRIFT = "256x128"
PLOTS = {"": reversible_plots.plot_times, "-memory": reversible_plots.plot_memory}


class Reversible(harness.Case):
    op = OP

    def __init__(self, problem: Problem):
        self.problem = problem
        self.shape, self.dtype, self.m, self.flops = problem.shape, problem.dtype, problem.depth, problem.flops
        self.limits: dict = {}

    @functools.cached_property
    def steps(self) -> list[Step]:
        """The same for all implementations, which only differ in what they make of the blocks."""
        first = Step(self.problem)
        count = harness.rotation(self.moved(first), self.problem.device)
        return [first, *(Step(self.problem) for _ in range(count - 1))]

    @staticmethod
    def moved(step: Step) -> int:
        """Forward: parameters in. Backward: parameters in, gradients out."""
        return 3 * step.held // 2

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        return definition(self.problem)

    def limits_of(self, peer: ReversiblePeer) -> list[float]:
        """Twice the errors of the same arithmetic in plain torch: of all gradients, and of each."""
        if peer.plain not in self.limits:
            step = self.steps[0]
            step.run(peer.plain(step.blocks))
            self.limits[peer.plain] = [2 * error + 1e-6 for error in errors(step.grads, self.reference)]
        return self.limits[peer.plain]

    def limit_of(self, peer: ReversiblePeer) -> float:
        return self.limits_of(peer)[0]

    def build(self, peer: ReversiblePeer) -> harness.Trial:
        calls = [functools.partial(step.run, peer.network(step.blocks, self.dtype)) for step in self.steps]
        return harness.Trial(calls, self.moved(self.steps[0]), self.steps[0].held)

    def error(self, peer: ReversiblePeer, result: None) -> float:
        """Of all gradients; each alone is held against its own limit, as their sizes differ."""
        found = errors(self.steps[0].grads, self.reference)
        excess = [error / limit for error, limit in zip(found, self.limits_of(peer), strict=True)]
        if not all(times <= 10 for times in excess):
            raise Skip(f"WRONG: the error of a gradient is {max(excess):.0f}x its limit")
        return found[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", help="WIDTHxTOKENS,...; widths are multiples of 64")
    parser.add_argument("--m", help="blocks, 6,12,...")


def depths(args: argparse.Namespace) -> list[int]:
    return sorted(map(int, args.m.split(","))) if args.m else QUICK_M if args.quick else FULL_M


def cases(args: argparse.Namespace) -> list[harness.Case]:
    shapes = (args.shapes or SHAPE[args.device]).split(",")
    each = itertools.product(shapes, args.dtype, depths(args))
    return [Reversible(Problem(shape, dtype, args.device, depth)) for shape, dtype, depth in each]


class ReversibleGoals(Goals):
    def flat(self, shape: str) -> None:
        deep, shallow = (self.row(OP, shape, depth) for depth in (DEEP, SHALLOW))
        value = deep.added_mb / shallow.added_mb if deep.added_mb and shallow.added_mb else None
        why = next((row.note for row in (deep, shallow) if not row.peak_mb), "")
        self.add(deep, f"{{:.3f}}x the memory of {SHALLOW} blocks", "<=", 1.05, value, why)


def goals(rows: list[harness.Row], device: str) -> list[Goal]:
    """The time of four forwards for that of three, whatever the depth the memory of one block."""
    found = []
    for dtype in dict.fromkeys(row.dtype for row in rows if row.m):
        own = ReversibleGoals(rows, dtype=dtype)
        for shape in own.shapes:
            own.speed(OP, shape, TIMED, "torch", MOST, "<=")
            own.flat(shape)
        found += own.found
    return found


def memory_table(rows: list[harness.Row]) -> str:
    """MB beside parameters and gradients, a line for each implementation."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        if row.peak_mb:
            line = lines.setdefault((row.shape, row.dtype, row.impl), {})
            line |= {"shape": row.shape, "dtype": row.dtype, "impl": row.impl, f"{row.m} blocks": row.added_mb}
    columns = list(dict.fromkeys(itertools.chain(*lines.values())))
    return "MB of a step, beside parameters and gradients\n" + report.table(list(lines.values()), columns)


def after(args: argparse.Namespace, rows: list[harness.Row], stem: pathlib.Path, title: str) -> str:
    """Memory and drift over depth."""
    shape = args.shapes.split(",")[0] if args.shapes else DRIFT
    peers = [PEERS[name] for name in args.peers if not PEERS[name].missing(args.device)]
    recovering = [peer for peer in peers if peer.recovers]
    found = reversible_drift.measure(shape, args.dtype, args.device, depths(args), recovering)
    path = stem.with_name(stem.name + "-drift")
    about = f"{shape}, against stored activations"
    report.write_json(path.with_suffix(".json"), {"inputs": about, "rows": found})
    with contextlib.suppress(ImportError):  # of matplotlib
        reversible_plots.plot_drift(path.with_suffix(".png"), found, f"{title}, {about}")
    return "\n\n".join([memory_table(rows), reversible_drift.table(found)])
