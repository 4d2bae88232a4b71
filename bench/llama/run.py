"""Benches of whole Llamas: every way in a process of its own, its losses checked, then timed in
turns.

A round is a process of each; ratios are those of the same round, so that a slow spell of the
machine is in none.
"""

import argparse
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from bench import options, session
from bench.llama import shapes
from bench.llama.ways import PEERS, judge
from bench.measure import machine, own_process
from bench.measure.spread import Spread, ratio
from bench.report import tables
from bench.report.goals import Goal

CHECKED = {"layers": 2, "seq": 32, "batch": 1}  # at most
FASTER = "{}: {{:.2f}}x the tokens/s of {}"
PAIRED = (
    3  # rounds that two need in common to be compared in pairs: each is the median of its steps
)


@dataclass
class Run:
    """The training steps of one way, or why there are none."""

    way: str
    shape: str
    layers: int
    batch: int
    seq: int
    checkpointing: bool
    seconds: list[float] = field(default_factory=list)  # of every step but each process's first
    rounds: list[int] = field(default_factory=list)  # that these were in
    tokens_per_s: float | None = None
    times_pyfast: float | None = None  # its time over that of pyfast's way of the same weights
    ratio_p20: float | None = None  # the spread of that
    ratio_p80: float | None = None
    built_bytes: int | None = None
    peak_bytes: int | None = (
        None  # of the whole process, model and Python included; on a GPU of its tensors
    )
    trained: int | None = None  # numbers
    losses: list[float] = field(default_factory=list)
    loss_error: float | None = None  # of the check, and its limit
    loss_limit: float | None = None
    note: str = ""

    def add(self, found: dict, turn: int) -> None:
        self.note = found["note"]
        self.loss_error = found.get("loss_error", self.loss_error)
        self.loss_limit = found.get("loss_limit", self.loss_limit)
        if "seconds" not in found:
            return
        self.seconds += found["seconds"]
        self.rounds += [turn] * len(found["seconds"])
        self.tokens_per_s = self.batch * self.seq / statistics.median(self.seconds)
        self.built_bytes, self.trained, self.losses = (
            found["built_bytes"],
            found["trained"],
            found["losses"],
        )
        self.peak_bytes = max(self.peak_bytes or 0, found["peak_bytes"])

    def by_round(self) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for seconds, turn in zip(self.seconds, self.rounds):
            found.setdefault(turn, []).append(seconds)
        return found


def compare(runs: Sequence[Run]) -> None:
    """Each with pyfast's way of the same weights."""
    mine = {
        PEERS[own.way].base: own
        for own in runs
        if own.way in ("pyfast", "pyfast-nf4") and own.seconds
    }
    for own in runs:
        base = mine.get(PEERS[own.way].base)
        if own is base:
            own.ratio_p20 = own.times_pyfast = own.ratio_p80 = 1.0
        elif own.seconds and base:
            own.times_pyfast, own.ratio_p20, own.ratio_p80 = ratio(
                own.by_round(), base.by_round(), PAIRED
            )


def add_arguments(
    parser: argparse.ArgumentParser, ways: Sequence[str], **defaults: str | int | None
) -> None:
    """Those of `defaults`, and a few for all; what is None the bench sets by device."""
    for name, value in defaults.items():
        kind = {"choices": shapes.SHAPES} if name == "shape" else {"type": int}
        parser.add_argument(
            f"--{name}", default=value, **kind, help=f"default: {value or 'by device'}"
        )
    options.add_budget(parser)
    options.add_compare(parser)
    parser.add_argument("--peers", default=",".join(ways), help="default: %(default)s")
    parser.add_argument(
        "--limit", type=float, help="GB that a process may have; default: most of the machine's"
    )


def run(
    name: str, args: argparse.Namespace, goals_of: Callable[[list[Run]], list[Goal]]
) -> pathlib.Path:
    """Checks, then measures; the result, which is written after every run."""
    names = args.peers.split(",")
    if unknown := set(names) - set(PEERS):
        raise SystemExit(
            f"--peers: unknown {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}"
        )
    args.layers = args.layers or shapes.config(args.shape).num_hidden_layers
    args.limit = args.limit or _most(args.device)
    about = machine.describe(args.device)
    print(" | ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    sizes = {
        key: getattr(args, key) for key in ("shape", "layers", "batch", "seq", "checkpointing")
    }
    runs = [Run(way, note=PEERS[way].missing(args.device) or "", **sizes) for way in names]
    right: dict[str, dict] = {}  # by judge
    path, end = args.out / f"{name}.json", time.monotonic() + (args.budget or math.inf)

    def save() -> list[Goal]:
        compare(runs)
        goals, more = (
            goals_of(runs),
            {"steps": args.steps, "rounds": args.rounds, "limit_gb": args.limit},
        )
        found = {
            "bench": name.partition("-")[0],
            "machine": about,
            "flags": args.flags,
            "setup": sizes | more,
        }
        found |= {"rows": [asdict(own) for own in runs]}
        found["goals"] = [asdict(goal) | {"met": goal.met} for goal in goals]
        tables.write_json(path, found)
        tables.write_csv(path.with_suffix(".csv"), runs, about)
        return goals

    for turn in range(args.rounds):
        for own in runs:
            expected = [] if own.seconds or own.note else _right(own, args, end, right)
            if own.seconds or not own.note:
                print(f"{own.way}, round {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
                more = {"steps": args.steps, "check": _small(args), "right": expected}
                own.add(_measure(own.way, args, end, **sizes, **more), turn + 1)
            save()
    goals = save()
    files = ", ".join([str(path), ".csv", *session.plot(path)])
    print("\n" + table(runs) + "\n\n" + tables.goals_block(goals) + f"\n\nwritten: {files}")
    return path


def _most(device: str) -> float:
    """GB: on a CPU some are left to the rest of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    return 0.85 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _measure(way: str, args: argparse.Namespace, end: float, **setup) -> dict:
    left = end - time.monotonic()
    if left <= 0:
        return {"note": "not run: the budget is spent"}
    words = {"way": way, "device": args.device, **setup}
    seconds = None if left == math.inf else left
    return own_process.run("bench.llama.step", words, args.device, args.limit, seconds)


def _small(args: argparse.Namespace) -> dict[str, int]:
    return {key: min(most, getattr(args, key)) for key, most in CHECKED.items()} | {"steps": 3}


def _right(own: Run, args: argparse.Namespace, end: float, known: dict[str, dict]) -> list[float]:
    """The losses of its judge, on few layers; or none, with a note."""
    by = judge(PEERS[own.way]).name
    if by not in known:
        print(f"{by}: what the losses must be", file=sys.stderr, flush=True)
        setup = {"shape": args.shape, "checkpointing": args.checkpointing} | _small(args)
        known[by] = _measure(by, args, end, **setup)
    if "losses" not in known[by]:
        own.note = f"not checked: {by}: {known[by]['note']}"
    return known[by].get("losses", [])


def table(runs: list[Run]) -> str:
    lines = [line(own) for own in runs]
    return _sizes(runs[0]) + "\n" + tables.table(lines, list(lines[0]))


def line(own: Run) -> dict[str, str]:
    def show(value: float | None, form: str, scale: float = 1) -> str:
        return "-" if value is None else format(value * scale, form)

    beside = show(own.times_pyfast, ".2f")
    if own.ratio_p20 is not None and own.ratio_p20 != own.ratio_p80:
        beside += f" ({own.ratio_p20:.2f} to {own.ratio_p80:.2f})"
    return {
        "way": own.way,
        "trained M": show(own.trained, ".1f", 1e-6),
        "s/step": show(statistics.median(own.seconds) if own.seconds else None, ".3g"),
        "tokens/s": show(own.tokens_per_s, ".4g"),
        "x pyfast (p20 to p80)": beside,
        "peak GB": show(own.peak_bytes, ".2f", 1e-9),
        "model GB": show(own.built_bytes, ".2f", 1e-9),
        "first loss": show(own.losses[0] if own.losses else None, ".4f"),
        "last": show(own.losses[-1] if own.losses else None, ".4f"),
        "check": "-" if own.loss_error is None else f"{own.loss_error:.1e} of {own.loss_limit:.1e}",
        "note": own.note,
    }


def _sizes(own: Run) -> str:
    kept = "activations of a layer computed again" if own.checkpointing else "activations kept"
    return (
        f"Llama {own.shape}, {own.layers} layers, {own.batch} x {own.seq} tokens, bfloat16, {kept}"
    )


def goal(
    runs: list[Run], text: str, sense: str, target: float, value: Callable[..., Spread], *ways: str
) -> list[Goal]:
    """The goal that `value` of these ways' runs is held against; none where one of them was not asked for."""
    found = {own.way: own for own in runs if own.way in ways}
    if len(found) < len(ways):
        return []
    missing = [f"{way}: {found[way].note or 'not yet'}" for way in ways if not found[way].seconds]
    measured = {} if missing else value(*(found[way] for way in ways))._asdict()
    return [Goal(text, sense, target, why="; ".join(missing), **measured)]


def faster(runs: list[Run], mine: str, other: str, target: float = 1.0) -> list[Goal]:
    def times(a: Run, b: Run) -> Spread:
        return ratio(b.by_round(), a.by_round(), PAIRED)

    return goal(runs, FASTER.format(mine, other), ">=", target, times, mine, other)


def smaller(runs: list[Run], mine: str, other: str) -> list[Goal]:
    text = f"{mine}: {{:.2f}}x the peak memory of {other}"
    return goal(
        runs, text, "<=", 1.0, lambda a, b: Spread(a.peak_bytes / b.peak_bytes), mine, other
    )
