"""The words of the command line, and the files they name. What is wrong with them is said in one line."""

import argparse
import json
import pathlib
import re
from dataclasses import fields
from typing import Any

import torch

from bench.measure import machine
from bench.report.goals import Goal

HERE = pathlib.Path(__file__).parent


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def number(text: str) -> int:
    """16384, 16K or 1M."""
    if not re.fullmatch(r"[1-9]\d*[KkMm]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number such as 512, 16K or 1M")
    scale = {"K": 2**10, "M": 2**20}.get(text[-1].upper())
    return int(text[:-1]) * scale if scale else int(text)


def numbers(text: str) -> list[int]:
    return sorted({number(part) for part in text.split(",")})


def seconds(text: str) -> float:
    found = float(text)
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return found


def existing(text: str) -> pathlib.Path:
    if not pathlib.Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file or folder")
    return pathlib.Path(text)


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help="about as long as this, all benches together",
    )


def add_compare(parser: argparse.ArgumentParser) -> None:
    """For a bench whose `run` returns the path of its result."""
    what = "a result, or a folder of them: what became faster or slower since"
    parser.add_argument("--compare", type=existing, metavar="OLD", help=what)


def parse(name: str, module: Any, words: list[str], known_peers: list[str]) -> argparse.Namespace:
    """Of one bench; a peer need only be known to one of those that run."""
    parser = Parser(f"python -m bench {name}", description=module.__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=found, help="default: %(default)s"
    )
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument(
        "--quick", action="store_true", help="few sizes, some minutes; without it they take twice"
    )
    how_much.add_argument("--full", action="store_true", help="every size, up to an hour")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="default: bench/results/<device>-<machine>"
    )
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    if hasattr(module, "cases"):
        add_budget(parser)
        add_compare(parser)
        _add_cases(parser, module)
    args = parser.parse_args(words)
    if args.device == "cuda" and found != "cuda":
        parser.error("--device cuda: this machine shows no CUDA device")
    if hasattr(module, "cases"):
        _settle(parser, module, args, known_peers)
    args.flags = _flags(words)
    args.out = args.out or HERE / "results" / f"{args.device}-{machine.short_name(args.device)}"
    return args


def _flags(words: list[str]) -> str:
    """But for where the files go, which no figure depends on."""
    return re.sub(r"(^| )--out[ =]\S+", "", " ".join(words)).strip()


HELP = {
    "shapes": "sizes of a weight, ...",
    "m": "rows, tokens or blocks: 1,64,16K",
    "r": "ranks or rounds: 1,4",
}


def _add_cases(parser: Parser, module: Any) -> None:
    for key in dict.fromkeys(key for sizes in module.SIZES.values() for key in sizes):
        parser.add_argument(f"--{key}", type=str if key == "shapes" else numbers, help=HELP[key])
    parser.add_argument("--dtype", help=f"some of {','.join(machine.DTYPES)}")
    parser.add_argument("--peers", default=",".join(module.PEERS), help="default: %(default)s")


def _settle(parser: Parser, module: Any, args: argparse.Namespace, known_peers: list[str]) -> None:
    """What was not said is the bench's."""
    level = "full" if args.full else "quick"
    sizes = module.SIZES.get(f"{args.device} {level}") or module.SIZES[level]
    if getattr(args, "shapes", None):
        args.shapes = args.shapes.split(",")
        _check_shapes(parser, args.shapes, next(iter(sizes["shapes"])))
    for key, value in sizes.items():
        setattr(args, key, getattr(args, key) or list(value))
    args.dtype = (
        args.dtype.split(",")
        if args.dtype
        else getattr(module, "DTYPE", {}).get(args.device, ["bf16"])
    )
    args.peers = args.peers.split(",")
    for option, given, known in (
        ("dtype", args.dtype, machine.DTYPES),
        ("peers", args.peers, known_peers),
    ):
        for unknown in sorted(set(given) - set(known)):
            parser.error(f"--{option}: unknown {unknown!r}; there are {', '.join(known)}")
    args.peers = [peer for peer in module.PEERS if peer in args.peers]
    if not args.peers:
        parser.error(f"--peers: none of these; there are {', '.join(module.PEERS)}")
    args.budget = args.budget or module.BUDGET[level] * (1 if args.quick or args.full else 2)


def _check_shapes(parser: Parser, given: list[str], example: str) -> None:
    numbers = len(example.split("x"))
    for shape in given:
        if not re.fullmatch("x".join([r"[1-9]\d*"] * numbers), shape):
            parser.error(f"--shapes: {shape!r} must be {numbers} numbers, such as {example}")


def share_budget(
    modules: dict[str, Any], parsed: dict[str, argparse.Namespace], words: list[str]
) -> None:
    """The seconds given are for all: each has its part, by what it takes of itself."""
    if any(word.partition("=")[0] == "--budget" for word in words):
        usual = {
            name: getattr(module, "BUDGET", {"quick": 60})["quick"]
            for name, module in modules.items()
        }
        for name, args in parsed.items():
            args.budget *= usual[name] / sum(usual.values())


def results(place: pathlib.Path | None) -> dict[str, dict]:
    """By the names of files; of one, or of a folder."""
    found = {}
    for path in (
        [] if place is None else [place] if place.is_file() else sorted(place.glob("*.json"))
    ):
        try:
            found[path.stem] = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise SystemExit(f"python -m bench: {path}: not a result: {error}") from None
    return found


def goals_in(folder: pathlib.Path) -> list[Goal]:
    known = {field.name for field in fields(Goal)}
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    found = [
        goal for path in paths for data in results(path).values() for goal in data.get("goals", ())
    ]
    return [Goal(**{key: value for key, value in goal.items() if key in known}) for goal in found]
