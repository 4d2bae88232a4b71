"""Benches of whole Llamas: losses of all methods are checked, then they are timed in turns.

Every method runs in a process of its own. A round is a process of each. Ratios are those of the
same round, so that a slow spell of the machine is in none.
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
from bench.llama.methods import PEERS, float32_method
from bench.measure import machine, own_process
from bench.measure.spread import Spread, ratio
from bench.report import files, tables
from bench.report.goals import Goal

CHECKED_SIZES = {"layers": 2, "seq": 32, "batch": 1}  # at most
CHECKED_STEPS = 3
# Rounds that two methods need in common to be compared in pairs: each is the median of its steps.
MIN_SHARED_ROUNDS = 3
SIZE_KEYS = ("shape", "layers", "batch", "seq", "checkpointing")


@dataclass
class Run:
    """The training steps of one method, or why there are none: a row of the result."""

    method: str
    shape: str
    layers: int
    batch: int
    seq: int
    checkpointing: bool
    seconds: list[float] = field(default_factory=list)  # of every step but each process's first
    rounds: list[int] = field(default_factory=list)  # the round of each of these steps
    tokens_per_s: float | None = None
    times_pyfast: float | None = None  # its time over that of pyfast's method of the same weights
    ratio_p20: float | None = None  # the spread of times_pyfast
    ratio_p80: float | None = None
    built_bytes: int | None = None
    # Of the whole process, model and Python included; on a GPU of its tensors.
    peak_bytes: int | None = None
    trained: int | None = None  # numbers
    losses: list[float] = field(default_factory=list)
    loss_error: float | None = None  # of the check, and its limit
    loss_limit: float | None = None
    note: str = ""

    def add(self, result: dict, round_number: int) -> None:
        """Add the result of one process."""
        self.note = result["note"]
        self.loss_error = result.get("loss_error", self.loss_error)
        self.loss_limit = result.get("loss_limit", self.loss_limit)
        if "seconds" not in result:
            return
        self.seconds += result["seconds"]
        self.rounds += [round_number] * len(result["seconds"])
        self.tokens_per_s = self.batch * self.seq / statistics.median(self.seconds)
        self.built_bytes, self.trained = result["built_bytes"], result["trained"]
        self.losses = result["losses"]
        self.peak_bytes = max(self.peak_bytes or 0, result["peak_bytes"])

    def by_round(self) -> dict[int, list[float]]:
        """Return the seconds of the steps by round."""
        rounds: dict[int, list[float]] = {}
        for seconds, number in zip(self.seconds, self.rounds):
            rounds.setdefault(number, []).append(seconds)
        return rounds


def record_fields(run: Run) -> dict:
    """Return the fields of a run as a record has them; there the method is called "way"."""
    fields = asdict(run)
    return {"way": fields.pop("method"), **fields}


def compare_with_pyfast(runs: Sequence[Run]) -> None:
    """Fill in the ratios to pyfast's method over the same weights."""
    bases = {}
    for run in runs:
        if run.method in ("pyfast", "pyfast-nf4") and run.seconds:
            bases[PEERS[run.method].base] = run
    for run in runs:
        base = bases.get(PEERS[run.method].base)
        if run is base:
            run.ratio_p20 = run.times_pyfast = run.ratio_p80 = 1.0
        elif run.seconds and base:
            times = ratio(run.by_round(), base.by_round(), MIN_SHARED_ROUNDS)
            run.times_pyfast, run.ratio_p20, run.ratio_p80 = times


def add_arguments(
    parser: argparse.ArgumentParser, methods: Sequence[str], **defaults: str | int | None
) -> None:
    """Add an option for each of `defaults`, and those that all benches of whole models have.

    A default of None is set later, by device.
    """
    for name, value in defaults.items():
        values = {"choices": shapes.SHAPES} if name == "shape" else {"type": int}
        text = f"default: {value or 'by device'}"
        parser.add_argument(f"--{name}", default=value, **values, help=text)
    options.add_budget(parser)
    options.add_compare(parser)
    parser.add_argument("--peers", default=",".join(methods), help="default: %(default)s")
    parser.add_argument(
        "--limit", type=float, help="GB that a process may have; default: most of the machine's"
    )


def run(
    name: str, args: argparse.Namespace, goals_of: Callable[[list[Run]], list[Goal]]
) -> pathlib.Path:
    """Check and measure the methods; write the result after every process, and return its path."""
    methods = args.peers.split(",")
    if unknown := set(methods) - set(PEERS):
        names = ", ".join(sorted(unknown))
        raise SystemExit(f"--peers: unknown {names}; there are {', '.join(PEERS)}")
    args.layers = args.layers or shapes.make_config(args.shape).num_hidden_layers
    args.limit = args.limit or _most_memory(args.device)
    conditions = machine.describe(args.device)
    print(" | ".join(f"{key} {value}" for key, value in conditions.items()), flush=True)
    sizes = {key: getattr(args, key) for key in SIZE_KEYS}
    runs = []
    for method in methods:
        note = PEERS[method].missing_reason(args.device) or ""
        runs.append(Run(method, note=note, **sizes))
    path, end = args.out / f"{name}.json", time.monotonic() + (args.budget or math.inf)

    def save() -> list[Goal]:
        compare_with_pyfast(runs)
        goals = goals_of(runs)
        _write(path, args, conditions, runs, goals)
        return goals

    expected_losses: dict[str, dict] = {}  # by the name of a float32 method
    for number in range(1, args.rounds + 1):
        for one in runs:
            expected = []
            if not one.seconds and not one.note:
                expected = _expect_losses(one, args, end, expected_losses)
            if one.seconds or not one.note:
                print(f"{one.method}, round {number} of {args.rounds}", file=sys.stderr, flush=True)
                check = {
                    "steps": args.steps,
                    "check": _checked_sizes(args),
                    "expected_losses": expected,
                }
                one.add(_measure(one.method, args, end, **sizes, **check), number)
            save()
    goals = save()
    print(f"\n{table(runs)}\n\n{tables.goals_table(goals)}\n\n{session.describe_written(path)}")
    return path


def _write(
    path: pathlib.Path,
    args: argparse.Namespace,
    conditions: dict,
    runs: list[Run],
    goals: list[Goal],
) -> None:
    setup = {key: getattr(args, key) for key in (*SIZE_KEYS, "steps", "rounds")}
    rows = [record_fields(run) for run in runs]
    content = {
        "bench": path.stem.partition("-")[0],
        "machine": conditions,
        "flags": args.flags,
        "setup": setup | {"limit_gb": args.limit},
        "rows": rows,
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
    }
    files.write_json(path, content)
    files.write_csv(path.with_suffix(".csv"), rows, conditions)


def _most_memory(device: str) -> float:
    """Return the machine's memory in GB; on a CPU without what the rest of it needs."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    return 0.85 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _measure(method: str, args: argparse.Namespace, end: float, **setup) -> dict:
    left = end - time.monotonic()
    if left <= 0:
        return {"note": "not run: the budget is spent"}
    arguments = {"method": method, "device": args.device, **setup}
    seconds = None if left == math.inf else left
    return own_process.run("bench.llama.step", arguments, args.device, args.limit, seconds)


def _checked_sizes(args: argparse.Namespace) -> dict[str, int]:
    sizes = {key: min(most, getattr(args, key)) for key, most in CHECKED_SIZES.items()}
    return sizes | {"steps": CHECKED_STEPS}


def _expect_losses(
    run: Run, args: argparse.Namespace, end: float, known: dict[str, dict]
) -> list[float]:
    """Return the losses of its float32 method on few layers; or none, and note why."""
    judge = float32_method(PEERS[run.method]).name
    if judge not in known:
        print(f"{judge}: what the losses must be", file=sys.stderr, flush=True)
        sizes = {"shape": args.shape, "checkpointing": args.checkpointing}
        known[judge] = _measure(judge, args, end, **sizes, **_checked_sizes(args))
    if "losses" not in known[judge]:
        run.note = f"not checked: {judge}: {known[judge]['note']}"
    return known[judge].get("losses", [])


def table(runs: list[Run]) -> str:
    """Return a table with a line for each method, under the sizes of the model."""
    run = runs[0]
    kept = "activations of a layer recomputed" if run.checkpointing else "activations kept"
    tokens = f"{run.batch} x {run.seq} tokens"
    heading = f"Llama {run.shape}, {run.layers} layers, {tokens}, bfloat16, {kept}"
    lines = [table_line(one) for one in runs]
    return heading + "\n" + tables.table(lines, list(lines[0]))


def table_line(run: Run) -> dict[str, str]:
    """Return the cells of a method, by column."""

    def show(value: float | None, form: str, scale: float = 1) -> str:
        return "-" if value is None else format(value * scale, form)

    times = show(run.times_pyfast, ".2f")
    if run.ratio_p20 is not None and run.ratio_p20 != run.ratio_p80:
        times += f" ({run.ratio_p20:.2f} to {run.ratio_p80:.2f})"
    check = "-" if run.loss_error is None else f"{run.loss_error:.1e} of {run.loss_limit:.1e}"
    return {
        "method": run.method,
        "trained M": show(run.trained, ".1f", 1e-6),
        "s/step": show(statistics.median(run.seconds) if run.seconds else None, ".3g"),
        "tokens/s": show(run.tokens_per_s, ".4g"),
        "x pyfast (p20 to p80)": times,
        "peak GB": show(run.peak_bytes, ".2f", 1e-9),
        "model GB": show(run.built_bytes, ".2f", 1e-9),
        "first loss": show(run.losses[0] if run.losses else None, ".4f"),
        "last": show(run.losses[-1] if run.losses else None, ".4f"),
        "check": check,
        "note": run.note,
    }


def make_goals(
    runs: list[Run],
    text: str,
    sense: str,
    target: float,
    value_of: Callable[..., Spread],
    *methods: str,
) -> list[Goal]:
    """Return the goal of a value of these methods' runs; none where one was not asked for."""
    by_method = {run.method: run for run in runs if run.method in methods}
    if len(by_method) < len(methods):
        return []
    untimed = [method for method in methods if not by_method[method].seconds]
    why = "; ".join(f"{method}: {by_method[method].note or 'not yet'}" for method in untimed)
    value = {} if untimed else value_of(*(by_method[method] for method in methods))._asdict()
    return [Goal(text, sense, target, why=why, **value)]


def faster_goals(runs: list[Run], method: str, other: str, target: float = 1.0) -> list[Goal]:
    """Return the goal that one method trains more tokens a second than another."""

    def speed(a: Run, b: Run) -> Spread:
        return ratio(b.by_round(), a.by_round(), MIN_SHARED_ROUNDS)

    text = f"{method}: {{:.2f}}x the tokens/s of {other}"
    return make_goals(runs, text, ">=", target, speed, method, other)


def smaller_goals(runs: list[Run], method: str, other: str) -> list[Goal]:
    """Return the goal that one method takes no more memory than another."""

    def memory(a: Run, b: Run) -> Spread:
        return Spread(a.peak_bytes / b.peak_bytes)

    text = f"{method}: {{:.2f}}x the peak memory of {other}"
    return make_goals(runs, text, "<=", 1.0, memory, method, other)
