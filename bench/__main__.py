"""`python -m bench` lists the benches; `python -m bench nf4 --quick` runs one.

A bench is a module bench/bench_<op>.py with `add_arguments(parser)`, `cases(args)` and
`goals(rows, device)`, and with PEERS and BUDGET, the implementations and the seconds of a run. It
may have DTYPE, its default by device; PLOTS, functions of (path, rows, title) by the ending of the
file, instead of the usual two; `after(args, rows, stem, title)`, which writes more files and
returns more to print; and `run(args)`, which is all there is to a bench that times nothing, and
elsewhere returns whether it was asked for something of its own.
"""

import argparse
import ast
import contextlib
import importlib
import os
import pathlib
import sys
import time
from dataclasses import asdict
from typing import Any

HERE = pathlib.Path(__file__).parent


def benches() -> dict[str, str]:
    """Name and first line of every bench, without importing it."""
    found = {}
    for path in sorted(HERE.glob("bench_*.py")):
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem.removeprefix("bench_")] = about.partition("\n")[0]
    return found


def parse(name: str, module: Any, words: list[str]) -> argparse.Namespace:
    import torch

    from bench import machine

    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(f"python -m bench {name}", description=module.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--quick", action="store_true", help="one shape, few sizes, some minutes")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="about as long as this")
    module.add_arguments(parser)
    if not hasattr(module, "PEERS"):
        return parser.parse_args(words)
    parser.add_argument("--dtype", help=",".join(machine.DTYPES))
    parser.add_argument("--peers", default=",".join(module.PEERS), help="default: %(default)s")
    args = parser.parse_args(words)
    args.dtype = (args.dtype or getattr(module, "DTYPE", {}).get(args.device, "bf16")).split(",")
    args.peers = args.peers.split(",")
    for given, known in ((args.dtype, machine.DTYPES), (args.peers, module.PEERS)):
        for unknown in set(given) - set(known):
            parser.error(f"unknown {unknown!r}; there are {', '.join(known)}")
    args.budget = args.budget or module.BUDGET[args.quick]
    return args


def measure(module: Any, args: argparse.Namespace, save: Any) -> list:
    """Every case in turn, each with its part of the time that is left."""
    from bench import harness

    missing = {name: module.PEERS[name].missing(args.device) for name in args.peers}
    present = [module.PEERS[name] for name, why in missing.items() if not why]
    absent = [harness.Row("all", "-", None, "-", n, note=why) for n, why in missing.items() if why]
    cases, rows, forecast = module.cases(args), [], harness.Forecast()
    end, total = time.monotonic() + args.budget, len(cases)
    while cases:
        share = max(min(1.0, args.budget / total), (end - time.monotonic()) / len(cases)) / len(present)
        case = cases.pop(0)
        size = f" M={case.m}" if case.m else ""
        what = f"{case.op} {case.shape} {case.dtype}{size} {case.variant}".rstrip()
        print(f"[{total - len(cases)}/{total}] {what}", file=sys.stderr, flush=True)
        rows += harness.run_case(case, present, args.device, share, args.budget / 60, forecast)
        save(rows + absent)
    return rows + absent


def run(name: str, words: list[str]) -> None:
    import torch

    from bench import harness, machine, report

    module = importlib.import_module(f"bench.bench_{name}")
    args = parse(name, module, words)
    if hasattr(module, "run") and module.run(args):
        return
    about = machine.describe(args.device)
    with contextlib.ExitStack() as stack:
        if args.device == "cuda":
            # Graphs can't be captured on the default stream, nor a backward on another one.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        ceilings = machine.ceilings(args.device, args.dtype)
        print(report.machine_lines(about, ceilings), flush=True)
        stem = args.out / f"{name}-{args.device}-{machine.short_name(args.device)}"

        def save(rows: list) -> list:
            harness.compare(rows, ceilings)
            goals = module.goals(rows, args.device)
            found = {"bench": name, "machine": about, "ceilings": ceilings}
            found["rows"] = [asdict(row) for row in rows]
            found["goals"] = [asdict(goal) | {"met": goal.met} for goal in goals]
            report.write_json(stem.with_name(stem.name + ".json"), found)
            report.write_csv(stem.with_name(stem.name + ".csv"), rows, about)
            return goals

        rows = measure(module, args, save)
        # Measured twice, a spell of other work on the machine does not pass for its ceiling.
        for key, rate in machine.ceilings(args.device, args.dtype).items():
            ceilings[key] = max(ceilings[key], rate)
    goals = save(rows)
    print("\n" + report.tables(rows))
    print("\n" + report.machine_lines(about, ceilings))
    print("\n" + report.goals_block(goals))
    print(f"\nwritten: {stem}.json, .csv")
    title = f"{name}: {about.get('gpu', about['cpu'])}, {about['isa']}"
    plots = {"": report.plot_times, "-memory": report.plot_memory}
    plot(stem, rows, title, getattr(module, "PLOTS", plots))
    if hasattr(module, "after"):
        print("\n" + module.after(args, rows, stem, title))


def plot(stem: pathlib.Path, rows: list, title: str, plots: dict) -> None:
    files = {f"{ending}.png": draw for ending, draw in plots.items()}
    try:
        for ending, draw in files.items():
            draw(stem.with_name(stem.name + ending), rows, title)
        print(f"plots beside it: {', '.join(files)}")
    except ImportError:
        print("no plots: matplotlib is not installed")


def main() -> None:
    known = benches()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        for name, about in known.items():
            print(f"python -m bench {name:13} {about}")
        raise SystemExit(len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"))
    # An installed pyfast before the bare sources beside this folder, which have no compiled part.
    sys.path.append(sys.path.pop(0))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    run(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
