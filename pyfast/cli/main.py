"""The parser of `python -m pyfast` and the dispatch to its commands."""

import argparse
from typing import NoReturn

from pyfast.cli import demo, errors, finetune, info, predict, selftest

# Each module has SUMMARY, add_arguments(parser) and run(arguments), which returns the exit code.
COMMANDS = {
    "info": info,
    "selftest": selftest,
    "demo": demo,
    "finetune": finetune,
    "predict": predict,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; without a command, list all, and fail."""
    parser = _Parser(prog="python -m pyfast")
    subparsers = parser.add_subparsers(metavar="command")
    for name, command in COMMANDS.items():
        epilog = errors.EXIT_CODES if command is finetune else None
        subparser = subparsers.add_parser(
            name, help=command.SUMMARY, description=command.SUMMARY, epilog=epilog
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        return _list_commands()
    return arguments.run(arguments)


def _list_commands() -> int:
    """Print one line for each command; return the exit code of a command line without one."""
    for name, command in COMMANDS.items():
        print(f"python -m pyfast {name:9} {command.SUMMARY}")
    return errors.WRONG


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("python -m ")
        self.exit(errors.WRONG, f"{command}: {message}; -h lists the arguments\n")
