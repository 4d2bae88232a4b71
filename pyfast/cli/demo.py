"""The command `demo`: everything at once, and a report of it."""

import argparse
from pathlib import Path

from pyfast.cli.errors import DONE, run_reporting
from pyfast.demo.run import QUICK, Size, run_demo

SUMMARY = "pretrain a small model, fine-tune it with every method, and write a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo` to its parser."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="directory of the report (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="use tiny sizes: takes seconds, and the numbers say little (default: full sizes)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and return the exit code; an error leaves the output directory as it was."""
    return run_reporting(
        "demo",
        lambda: _demo(arguments),
        stopped="stopped; nothing was written",
        out_of_memory="" if arguments.quick else "--quick takes less",
    )


def _demo(arguments: argparse.Namespace) -> int:
    run_demo(arguments.out, QUICK if arguments.quick else Size())
    return DONE
