"""Benches and their commands: `python -m bench` lists them.

`python -m bench nf4 lora --quick` runs some benches, `python -m bench --quick` those of all ops.
"""

import ast
import importlib
import itertools
import os
import pathlib
import signal
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# Modules by the names of benches. A module either measures cases, as `bench.session` describes, or
# has a function `run(args)` and, for options of its own, `add_arguments(parser)`.
BENCHES = {
    "adapter": "bench.adapter.bench",
    "duplication": "bench.reformer.duplication",
    "hf_patch": "bench.llama.hf_patch",
    "learning": "bench.reformer.learning",
    "long_attention": "bench.lsh_attention.long_attention",
    "long_context": "bench.reformer.long_context",
    "lora": "bench.lora.bench",
    "lsh_attention": "bench.lsh_attention.bench",
    "nf4": "bench.nf4.bench",
    "qlora_7b": "bench.llama.qlora_7b",
    "reversible": "bench.reversible.bench",
    "training_step": "bench.llama.training_step",
}
OPS = "nf4", "lora", "adapter", "lsh_attention", "reversible"
COMMANDS = {
    "goals": "DIR: list the goals of all results in a folder, met and missed",
    "compare": "OLD NEW: list what became faster or slower between two results, or folders",
    "page": "DIR: write a page of all results in a folder, as Markdown",
    "readme": "write the table of README.md from the committed results",
}


def describe_benches() -> dict[str, str]:
    """Return the first line of every bench's docstring, without importing it."""
    descriptions = {}
    for name, module in BENCHES.items():
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        descriptions[name] = docstring.partition("\n")[0]
    return descriptions


def list_commands() -> str:
    """Return a line for every bench and command."""
    entries = [*describe_benches().items(), *COMMANDS.items()]
    return "\n".join(f"python -m bench {name:14} {description}" for name, description in entries)


# The functions below import what they run, so that listing takes no second to import torch.


def run(names: list[str], words: list[str]) -> int:
    """Run benches in turn and print the goals of all; return 1 where pyfast was wrong."""
    from bench import options, session
    from bench.report import record, tables

    modules = {name: importlib.import_module(BENCHES[name]) for name in names}
    peers = {peer: None for module in modules.values() for peer in getattr(module, "PEERS", ())}
    parsed = {
        name: options.parse(name, module, words, list(peers)) for name, module in modules.items()
    }
    if len(names) > 1:
        options.share_budget(modules, parsed, words)
    old_results = options.results(getattr(parsed[names[0]], "compare", None))
    all_goals, is_wrong = [], False
    try:
        for name, module in modules.items():
            args = parsed[name]
            if hasattr(module, "cases"):
                goals, stopped = session.run(name, module, args)
                all_goals += goals
                if stopped:
                    raise KeyboardInterrupt
                path = args.out / f"{name}.json"
            else:
                path = module.run(args)
            is_wrong |= bool(path) and record.read(path).has_wrong_rows
            if getattr(args, "compare", None):
                print("\n" + compare_with_older(old_results, path))
    finally:
        if all_goals:
            print("\n" + tables.goals_table(all_goals))
    return int(is_wrong)


def compare_with_older(old_results: dict[str, dict], path: pathlib.Path) -> str:
    """Compare a result with the older one of that name or, without it, of that bench."""
    from bench.report import compare, record

    try:
        new = record.read(path)
        same_bench = [old for old in old_results.values() if old.get("bench") == new.subject]
        old = old_results.get(path.stem) or next(iter(same_bench), None)
        if not old:
            return f"{path.stem}: nothing to compare with"
        return compare.table(compare.between(old, new))
    except record.Damaged as error:
        return f"{path.stem}: {error}"


def run_command(name: str, words: list[str]) -> int:
    """Run one of COMMANDS."""
    from bench import options
    from bench.report import compare, page, parser, readme, tables

    if name in ("page", "readme"):
        return {"page": page, "readme": readme}[name].main(words)
    command_parser = parser.Parser(f"python -m bench {name}", description=COMMANDS[name])
    for argument in ("OLD", "NEW") if name == "compare" else ("DIR",):
        command_parser.add_argument(argument, type=options.existing)
    args = command_parser.parse_args(words)
    if name == "goals":
        print(tables.goals_table(options.goals_in(args.DIR)))
        return 0
    pairs = pair_results(args.OLD, args.NEW)
    if not pairs:
        command_parser.error(
            f"{args.OLD} and {args.NEW} must be two files, or two folders with results of the "
            "same ops"
        )
    return max(compare.main(*pair) for pair in pairs)


def pair_results(old: pathlib.Path, new: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Return the pairs of files to compare: both files, or those of one name in two folders."""
    if old.is_file() and new.is_file():
        return [(old, new)]
    pairs = [(path, new / path.name) for path in sorted(old.glob("*.json"))]
    return [pair for pair in pairs if pair[1].exists() and has_times(pair[0])]


def has_times(path: pathlib.Path) -> bool:
    """Return whether a result has times to compare.

    A damaged result counts as one that has, so that the comparison reports it.
    """
    from bench.report import record

    try:
        return bool(record.read(path).comparable)
    except record.Damaged:
        return True


def stop(*_: Any) -> None:
    """Handle a signal as an interruption."""
    raise KeyboardInterrupt


def main(words: list[str]) -> int:
    """Run the benches or the command that the words name; return the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(list_commands())
        return 0
    names = list(dict.fromkeys(itertools.takewhile(lambda word: not word.startswith("-"), words)))
    if names and names[0] in COMMANDS:
        return run_command(names[0], words[1:])
    for unknown in [name for name in names if name not in BENCHES]:
        message = f"unknown bench {unknown!r}; there are {', '.join(BENCHES)}"
        print(f"python -m bench: {message}", file=sys.stderr)
        return 2
    try:
        return run(names or list(OPS), words[len(names) :])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def main_piped(words: list[str]) -> int:
    """Run `main` for a reader that may leave early, such as `python -m bench | head -3`."""
    try:
        try:
            return main(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    # An installed pyfast is found before the bare sources beside this folder, which have no
    # compiled part.
    sys.path.append(sys.path.pop(0))
    # The profiler announces itself on stderr, and warns there.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    raise SystemExit(main_piped(sys.argv[1:]))
