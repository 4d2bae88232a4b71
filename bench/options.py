"""Options of the command line; what is wrong with them is reported in one line."""

import argparse
import json
import pathlib
import re
from dataclasses import fields
from typing import Any

import torch

from bench.measure import machine
from bench.report.goals import Goal
from bench.report.parser import Parser

HERE = pathlib.Path(__file__).parent


def number(text: str) -> int:
    """Parse a number such as 16384, 16K or 1M."""
    if not re.fullmatch(r"[1-9]\d*[KkMm]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number such as 512, 16K or 1M")
    scale = {"K": 2**10, "M": 2**20}.get(text[-1].upper())
    return int(text[:-1]) * scale if scale else int(text)


def numbers(text: str) -> list[int]:
    """Parse numbers separated by commas; return them sorted."""
    return sorted({number(part) for part in text.split(",")})


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return value


def existing(text: str) -> pathlib.Path:
    """Parse the path of a file or folder that exists."""
    if not pathlib.Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file or folder")
    return pathlib.Path(text)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add --budget."""
    parser.add_argument(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help="time that all benches of the run take together, about",
    )


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add --compare, for a bench whose `run` returns the path of its result."""
    parser.add_argument(
        "--compare",
        type=existing,
        metavar="OLD",
        help="an older result, or a folder of them: print what became faster or slower since",
    )


def parse(name: str, module: Any, words: list[str], known_peers: list[str]) -> argparse.Namespace:
    """Parse the options of one bench; a peer need only be known to one bench of the run."""
    parser = Parser(f"python -m bench {name}", description=module.__doc__)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default_device, help="default: %(default)s"
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick",
        action="store_true",
        help="few sizes, in some minutes; without this option they take twice the time",
    )
    level.add_argument("--full", action="store_true", help="every size, in up to an hour")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="default: bench/results/<device>-<machine>"
    )
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    if hasattr(module, "cases"):
        add_budget(parser)
        add_compare(parser)
        _add_case_options(parser, module)
    args = parser.parse_args(words)
    if args.device == "cuda" and default_device != "cuda":
        parser.error("--device cuda: this machine shows no CUDA device")
    if hasattr(module, "cases"):
        _fill_in_defaults(parser, module, args, known_peers)
    args.flags = _flags(words)
    args.out = args.out or HERE / "results" / f"{args.device}-{machine.short_name(args.device)}"
    return args


def _flags(words: list[str]) -> str:
    """Return the words without --out, which no figure depends on."""
    return re.sub(r"(^| )--out[ =]\S+", "", " ".join(words)).strip()


HELP = {
    "shapes": "sizes of a weight or of heads, separated by commas",
    "m": "rows, tokens or blocks, such as 1,64,16K",
    "r": "ranks or rounds of hashing, such as 1,4",
}


def _add_case_options(parser: Parser, module: Any) -> None:
    for key in dict.fromkeys(key for sizes in module.SIZES.values() for key in sizes):
        parser.add_argument(f"--{key}", type=str if key == "shapes" else numbers, help=HELP[key])
    parser.add_argument("--dtype", help=f"some of {','.join(machine.DTYPES)}")
    parser.add_argument("--peers", default=",".join(module.PEERS), help="default: %(default)s")


def _fill_in_defaults(
    parser: Parser, module: Any, args: argparse.Namespace, known_peers: list[str]
) -> None:
    """Check the case options, and set those that were not given to the bench's defaults."""
    level = "full" if args.full else "quick"
    sizes = module.SIZES.get(f"{args.device} {level}") or module.SIZES[level]
    if getattr(args, "shapes", None):
        args.shapes = args.shapes.split(",")
        _check_shapes(parser, args.shapes, next(iter(sizes["shapes"])))
    for key, value in sizes.items():
        setattr(args, key, getattr(args, key) or list(value))
    default_dtypes = getattr(module, "DTYPE", {}).get(args.device, ["bf16"])
    args.dtype = args.dtype.split(",") if args.dtype else default_dtypes
    args.peers = args.peers.split(",")
    _check_known(parser, "dtype", args.dtype, machine.DTYPES)
    _check_known(parser, "peers", args.peers, known_peers)
    args.peers = [peer for peer in module.PEERS if peer in args.peers]
    if not args.peers:
        parser.error(f"--peers: none of these; there are {', '.join(module.PEERS)}")
    args.budget = args.budget or module.BUDGET[level] * (1 if args.quick or args.full else 2)


def _check_known(parser: Parser, option: str, names: list[str], known: Any) -> None:
    for unknown in sorted(set(names) - set(known)):
        parser.error(f"--{option}: unknown {unknown!r}; there are {', '.join(known)}")


def _check_shapes(parser: Parser, shapes: list[str], example: str) -> None:
    count = len(example.split("x"))
    for shape in shapes:
        if not re.fullmatch("x".join([r"[1-9]\d*"] * count), shape):
            parser.error(f"--shapes: {shape!r} must be {count} numbers, such as {example}")


def share_budget(
    modules: dict[str, Any], parsed: dict[str, argparse.Namespace], words: list[str]
) -> None:
    """Divide a --budget among the benches, in proportion to their usual times."""
    if not any(word.partition("=")[0] == "--budget" for word in words):
        return
    usual = {name: getattr(module, "BUDGET", {"quick": 60}) for name, module in modules.items()}
    total = sum(budget["quick"] for budget in usual.values())
    for name, args in parsed.items():
        args.budget *= usual[name]["quick"] / total


def results(path: pathlib.Path | None) -> dict[str, dict]:
    """Return the content of a result, or of all in a folder, keyed by the names of the files."""
    if path is None:
        return {}
    contents = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.json")):
        try:
            contents[file.stem] = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise SystemExit(f"python -m bench: {file}: not a result: {error}") from None
    return contents


def goals_in(path: pathlib.Path) -> list[Goal]:
    """Return the goals of a result, or of all in a folder."""
    known = {field.name for field in fields(Goal)}
    goals = []
    for data in results(path).values():
        for goal in data.get("goals", ()):
            goals.append(Goal(**{key: value for key, value in goal.items() if key in known}))
    return goals
