"""One run of a bench that measures cases: its rows, tables and files.

Such a bench is a module with these names:

- `PEERS` and `BUDGET`: the implementations, and the seconds of a run;
- `SIZES`: sizes by device and by how much is asked for; their names become options;
- `cases(args)`: the cases to measure;
- `GOALS`: by device a list of rules, or a function of the rows that returns one;
- `SHAPES` (optional): the models that have a layer of a shape;
- `DTYPE` (optional): default dtypes by device;
- `after(args, rows, stem)` (optional): writes more files, and returns more to print.
"""

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from bench.measure import case, harness, machine
from bench.measure.row import Row
from bench.report import files, goals, record, tables
from bench.report.goals import Goal
from bench.report.plots.files import write_record_plots
from pyfast._support.progress import Progress

# A call that is forecast to take longer than so many seconds is not run; a larger budget allows
# for more.
PATIENCE = 10.0
PROGRESS_SECONDS = 30.0  # between two lines of progress, where stderr is no terminal


def run(name: str, module: Any, args: argparse.Namespace) -> tuple[list[Goal], str]:
    """Run a bench; return its goals and, if it was interrupted, after how many cases.

    What was finished before an interruption is written all the same.
    """
    conditions, stem = machine.describe(args.device), args.out / name
    header = {"bench": name, "machine": conditions, "flags": args.flags}
    with _use_stream(args.device):
        ceilings = machine.measure_ceilings(args.device, args.dtype)
        print(tables.machine_lines(conditions, ceilings), flush=True)

        def save(rows: list[Row], stopped: str = "") -> list[Goal]:
            harness.compare_with_ceilings(rows, ceilings)
            rules = module.GOALS[args.device]
            judged = goals.judge(rules(rows) if callable(rules) else rules, rows)
            stop = {"stopped": stopped} if stopped else {}
            _write(stem, header | stop | {"ceilings": ceilings}, rows, judged)
            return judged

        rows, stopped = _measure(name, module, args, save)
        case.clear_definitions()
        if not stopped:
            ceilings = machine.measure_ceilings(args.device, args.dtype, again=True)
        judged = save(rows, stopped)
        print(f"\n{tables.tables(rows)}\n\n{tables.machine_lines(conditions, ceilings)}")
        print(f"\n{describe_written(stem.with_suffix('.json'))}")
        if stopped:
            print(f"{name}: stopped {stopped}; what was finished is in the files")
        elif hasattr(module, "after"):
            print("\n" + module.after(args, rows, stem))
    return judged, stopped


def _use_stream(device: str) -> contextlib.AbstractContextManager:
    """Enter a stream: graphs can't be captured on the default one, nor a backward on another."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def _measure(
    name: str, module: Any, args: argparse.Namespace, save: Callable
) -> tuple[list[Row], str]:
    """Measure every case in turn, each with its part of the time that is left.

    Returns the rows and, if it was interrupted, after how many cases.
    """
    missing = {peer: module.PEERS[peer].missing_reason(args.device) for peer in args.peers}
    args.present = [module.PEERS[peer] for peer, why in missing.items() if not why]
    absent = [Row("all", "-", None, "-", peer, note=why) for peer, why in missing.items() if why]
    cases, rows, forecast = list(module.cases(args)), [], harness.Forecast()
    end, total = time.monotonic() + args.budget, len(cases)
    patience = max(PATIENCE, args.budget / 60)
    bar = Progress(name, total, budget=args.budget, line_every=PROGRESS_SECONDS)
    try:
        for done in range(total):
            current = cases.pop(0)  # so that its tensors are released before the next case
            bar.show(done, current.title)
            share = _share_of_time(current, cases, args.budget / total, end - time.monotonic())
            share /= max(1, len(args.present))
            rows += harness.measure_case(
                current, args.present, args.device, share, patience, forecast
            )
            for row in rows:
                row.model = getattr(module, "SHAPES", {}).get(row.shape, "")
            save(rows + absent)
    except KeyboardInterrupt:
        return rows + absent, f"after {done} of {total} cases"
    finally:
        bar.clear()
    return rows + absent, ""


def _share_of_time(current: Any, later: list, average: float, left: float) -> float:
    """Return the seconds of a case: its part by weight, and a minimum where none are left."""
    weight = current.time_weight
    part = weight / (weight + sum(one.time_weight for one in later))
    return max(min(1.0, average), left * part)


def _write(stem: pathlib.Path, header: dict, rows: list[Row], judged: list[Goal]) -> None:
    row_fields = [asdict(row) for row in rows]
    content = {
        "rows": row_fields,
        "goals": [asdict(goal) | {"met": goal.met} for goal in judged],
    }
    files.write_json(stem.with_suffix(".json"), header | content)
    if rows:
        files.write_csv(stem.with_suffix(".csv"), row_fields, header["machine"])


def plot(path: pathlib.Path) -> list[str]:
    """Write the plots of a result beside it; return their names."""
    try:
        return write_record_plots(record.read(path))
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return []


def describe_written(path: pathlib.Path) -> str:
    """Write the plots of a result, and return a line that names all files of it."""
    table_file = [".csv"] if path.with_suffix(".csv").exists() else []
    return f"written: {', '.join([str(path), *table_file, *plot(path)])}"
