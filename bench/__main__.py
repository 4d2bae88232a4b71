"""`python -m bench` lists the benches; `python -m bench nf4 lora --quick` runs some, `python -m
bench --quick` all ops.

A bench is a module bench/bench_<name>.py: of an op, as `bench.session` says, or of anything else,
with `run(args)` and, if it has options of its own, `add_arguments(parser)`; --budget and --compare
are two of those (`bench.options`).
"""

import ast
import importlib
import itertools
import os
import pathlib
import signal
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
BENCHES = {
    "adapter": "adapter.bench",
    "duplication": "reformer.duplication_bench",
    "hf_patch": "llama.hf_patch",
    "learning": "reformer.learning_bench",
    "long_attention": "lsh_attention.long_attention",
    "long_context": "reformer.long_context",
    "lora": "lora.bench",
    "lsh_attention": "lsh_attention.bench",
    "nf4": "nf4.bench",
    "qlora_7b": "llama.qlora_7b",
    "reversible": "reversible.bench",
    "training_step": "llama.training_step",
}
OPS = "nf4", "lora", "adapter", "lsh_attention", "reversible"
COMMANDS = {
    "goals": "DIR: the goals of all results in a folder, and what became of them",
    "compare": "OLD NEW: what became faster or slower between two results, or folders of them",
    "page": "DIR: a page, as HTML and as Markdown, of all results in a folder",
    "figures": "the README's figures, from the committed results",
}


def benches() -> dict[str, str]:
    """Name and first line of every bench, without importing it."""
    found = {}
    for name, module in BENCHES.items():
        path = HERE.joinpath(*module.split(".")).with_suffix(".py")
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[name] = about.partition("\n")[0]
    return found


def listing() -> str:
    entries = [*benches().items(), *COMMANDS.items()]
    return "\n".join(f"python -m bench {name:14} {about}" for name, about in entries)


def run(names: list[str], words: list[str]) -> int:
    """Every bench in turn, then the goals of all; 1 where pyfast was wrong."""
    from bench import options, session
    from bench.report import record, tables

    modules = {name: importlib.import_module(f"bench.{BENCHES[name]}") for name in names}
    peers = {peer: None for module in modules.values() for peer in getattr(module, "PEERS", ())}
    parsed = {
        name: options.parse(name, module, words, list(peers)) for name, module in modules.items()
    }
    if len(names) > 1:
        options.share_budget(modules, parsed, words)
    old = options.results(getattr(parsed[names[0]], "compare", None))
    found, wrong = [], False
    try:
        for name, module in modules.items():
            args = parsed[name]
            if hasattr(module, "cases"):
                goals, stopped = session.run(name, module, args)
                found += goals
                if stopped:
                    raise KeyboardInterrupt
                path = args.out / f"{name}.json"
            else:
                path = module.run(args)
            wrong |= bool(path) and record.read(path).wrong
            if getattr(args, "compare", None):
                print("\n" + compared(old, path))
    finally:
        if found:
            print("\n" + tables.goals_block(found))
    return int(wrong)


def compared(old: dict[str, dict], path: pathlib.Path) -> str:
    """With the older one of that name or, without it, of that bench."""
    from bench.report import compare, record

    try:
        new = record.read(path)
        same = [data for data in old.values() if data.get("bench") == new.kind]
        before = old.get(path.stem) or next(iter(same), None)
        return (
            compare.table(compare.between(before, new))
            if before
            else f"{path.stem}: nothing to compare with"
        )
    except record.Damaged as error:
        return f"{path.stem}: {error}"


def command(name: str, words: list[str]) -> int:
    """Of COMMANDS."""
    from bench import options
    from bench.report import tables

    if name in ("page", "figures"):
        return importlib.import_module(f"bench.report.{name}").main(words)
    parser = options.Parser(f"python -m bench {name}", description=COMMANDS[name])
    for place in ("OLD", "NEW") if name == "compare" else ("DIR",):
        parser.add_argument(place, type=options.existing)
    found = vars(parser.parse_args(words))
    if name == "goals":
        print(tables.goals_block(options.goals_in(found["DIR"])))
        return 0
    from bench.report import compare

    old, new = found["OLD"], found["NEW"]
    if old.is_file() and new.is_file():
        return compare.main(old, new)
    pairs = [
        (path, new / path.name) for path in sorted(old.glob("*.json")) if (new / path.name).exists()
    ]
    pairs = [pair for pair in pairs if times(pair[0])]
    if not pairs:
        parser.error(
            f"{old} and {new} must be two files, or two folders with results of the same ops"
        )
    return max(compare.main(*pair) for pair in pairs)


def times(path: pathlib.Path) -> bool:
    """Whether a result has times to compare; one that can't be read is for the comparison to say."""
    from bench.report import record

    try:
        return bool(record.read(path).comparable)
    except record.Damaged:
        return True


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def main(words: list[str]) -> int:
    known = benches()
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    names = list(dict.fromkeys(itertools.takewhile(lambda word: not word.startswith("-"), words)))
    if names and names[0] in COMMANDS:
        return command(names[0], words[1:])
    for unknown in [name for name in names if name not in known]:
        print(
            f"python -m bench: unknown bench {unknown!r}; there are {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    try:
        return run(names or list(OPS), words[len(names) :])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def piped(words: list[str]) -> int:
    """The same, for a reader that may leave early: `python -m bench | head -3`."""
    try:
        try:
            return main(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for what Python still flushes at its end
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    # An installed pyfast before the bare sources beside this folder, which have no compiled part.
    sys.path.append(sys.path.pop(0))
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # the profiler announces itself on stderr, and warns there
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    raise SystemExit(piped(sys.argv[1:]))
