"""The shell commands."""

import argparse
from pathlib import Path
from typing import NoReturn

import torch

from pyfast.cli import errors, finetune, predict, selftest
from pyfast.cli.info import info
from pyfast.demo import run


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code."""
    parser = _Parser(prog="python -m pyfast")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "info", help="what is installed, what this machine has, which path each op takes"
    )
    command.set_defaults(run=lambda args: info())
    command = commands.add_parser("selftest", help="every op against its reference on this machine")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.set_defaults(run=lambda args: selftest.run(args.device))
    command = commands.add_parser(
        "demo", help="pretrain a small model, fine-tune it in every way; a report"
    )
    command.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="directory of the report (%(default)s)"
    )
    command.add_argument(
        "--quick", action="store_true", help="tiny sizes: seconds, and figures that say little"
    )
    command.set_defaults(run=lambda args: run.run(args.out, args.quick))
    command = commands.add_parser(
        "finetune", help="train a transformers checkpoint on your texts", epilog=errors.CODES
    )
    finetune.add_finetune(command)
    command.set_defaults(run=finetune.run_finetune)
    command = commands.add_parser("predict", help="what a fine-tuned model says")
    predict.add_predict(command)
    command.set_defaults(run=predict.run_predict)
    args = parser.parse_args(argv)
    return args.run(args)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(
            errors.WRONG,
            f"{self.prog.removeprefix('python -m ')}: {message}; -h lists the arguments\n",
        )
