"""One run of a bench that measures cases: its rows, tables and files.

Such a bench is a module with PEERS and BUDGET, the implementations and the seconds of a run; SIZES,
by device and how much is asked for, whose names are options; `cases(args)`; and GOALS, by device: a
list, or a function of the rows that gives one. It may have SHAPES, the models that have such a
layer; DTYPE, its default by device; and `after(args, rows, stem)`, which writes more files and
returns more to print.
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
from bench.measure.case import Row
from bench.measure.progress import Progress
from bench.report import goals, tables
from bench.report.goals import Goal

PATIENCE = 10.0  # seconds: what is foretold to take longer for one call is not run; more with a larger budget


def run(name: str, module: Any, args: argparse.Namespace) -> tuple[list[Goal], str]:
    """The goals; and where it was interrupted, if it was: what had been finished is written all the same."""
    about, stem = machine.describe(args.device), args.out / name
    record = {"bench": name, "machine": about, "flags": args.flags}
    with _stream(args.device):
        ceilings = machine.ceilings(args.device, args.dtype)
        print(tables.machine_lines(about, ceilings), flush=True)

        def save(rows: list[Row], stopped: str = "") -> list[Goal]:
            harness.hold_against(rows, ceilings)
            aims = module.GOALS[args.device]
            found = goals.judge(aims(rows) if callable(aims) else aims, rows)
            more = {"stopped": stopped} if stopped else {}
            _write(stem, record | more | {"ceilings": ceilings}, rows, found)
            return found

        rows, stopped = _measure(name, module, args, save)
        case.forget()
        if not stopped:
            ceilings = machine.ceilings(args.device, args.dtype, again=True)
        found = save(rows, stopped)
        print(f"\n{tables.tables(rows)}\n\n{tables.machine_lines(about, ceilings)}")
        print(f"\nwritten: {', '.join([f'{stem}.json', '.csv', *plot(stem.with_suffix('.json'))])}")
        if stopped:
            print(f"{name}: stopped {stopped}; what was finished is in the files")
        elif hasattr(module, "after"):
            print("\n" + module.after(args, rows, stem))
    return found, stopped


def _stream(device: str) -> contextlib.AbstractContextManager:
    """Graphs can't be captured on the default stream, nor a backward on another one."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def _measure(
    name: str, module: Any, args: argparse.Namespace, save: Callable
) -> tuple[list[Row], str]:
    """Every case in turn, each with its part of the time that is left; and where it was stopped, if it was."""
    missing = {name: module.PEERS[name].missing(args.device) for name in args.peers}
    args.present = [module.PEERS[name] for name, why in missing.items() if not why]
    absent = [Row("all", "-", None, "-", name, note=why) for name, why in missing.items() if why]
    cases, rows, forecast = list(module.cases(args)), [], harness.Forecast()
    end, total, patience = (
        time.monotonic() + args.budget,
        len(cases),
        max(PATIENCE, args.budget / 60),
    )
    bar = Progress(name, total, args.budget)
    try:
        for done in range(total):
            own = cases.pop(0)  # and let go, with all that it found out, before the next
            bar.show(done, own.title)
            part = own.weight / (own.weight + sum(later.weight for later in cases))
            share = max(min(1.0, args.budget / total), (end - time.monotonic()) * part)
            share /= max(1, len(args.present))
            rows += harness.run_case(own, args.present, args.device, share, patience, forecast)
            for row in rows:
                row.model = getattr(module, "SHAPES", {}).get(row.shape, "")
            save(rows + absent)
    except KeyboardInterrupt:
        return rows + absent, f"after {done} of {total} cases"
    finally:
        bar.clear()
    return rows + absent, ""


def _write(stem: pathlib.Path, record: dict, rows: list[Row], found: list[Goal]) -> None:
    judged = [asdict(goal) | {"met": goal.met} for goal in found]
    rows_of = {"rows": [asdict(row) for row in rows], "goals": judged}
    tables.write_json(stem.with_suffix(".json"), record | rows_of)
    if rows:
        tables.write_csv(stem.with_suffix(".csv"), rows, record["machine"])


def plot(path: pathlib.Path) -> list[str]:
    """Of a result, beside it; their names."""
    try:
        from bench.report import record
        from bench.report.plots import timings

        return timings.write_all(record.read(path))
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return []
