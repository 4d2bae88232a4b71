"""The rules of CONTRIBUTING.md about sizes, names and docstrings, read from the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# pyfast/kernels is a link to kernels.
FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder in ("pyfast", "kernels", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.relative_to(ROOT).parts[:2] != ("pyfast", "kernels")
}
# Most of these functions' lines are parameters, one a line.
LONG_FUNCTIONS = {
    "pyfast/ops/lsh_attention.py": {"lsh_attention"},
    "pyfast/reference/_lsh_attention.py": {"lsh_attention_op"},
    "kernels/lsh_attention_backward.py": {"lsh_attention_keys_backward_kernel"},
}
BANNED = {
    "found", "given", "own", "ours", "theirs", "mine", "kind", "thing", "way", "wide", "into",
}  # fmt: skip
# The public parameter of `pyfast.merge`, and what passes it on.
MERGING = {"pyfast/adapters/api.py", "pyfast/adapters/lora/merging.py"}
FIRST_WORDS = {
    "Of", "By", "As", "To", "Be", "In", "With", "What", "Whether", "Those", "How", "It", "On",
    "At", "For", "From", "Where", "When", "Like", "Also", "Whatever", "Without",
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_kernel(name: str) -> bool:
    return name.startswith("kernels/")


def functions(name: str) -> list[Function]:
    return [node for node in ast.walk(FILES[name]) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Return the lines of a function without its decorators and its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def defined_names(name: str) -> Iterator[str]:
    """Yield the names that a file gives to variables, arguments, functions, classes and fields."""
    for node in ast.walk(FILES[name]):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_modules_are_short():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in FILES}
    long = {name: n for name, n in lines.items() if n > (450 if is_kernel(name) else 300)}
    assert not long


def test_functions_are_short():
    long = {}
    for name in FILES:
        limit = 120 if is_kernel(name) else 50
        if names := {function.name for function in functions(name) if length(function) > limit}:
            long[name] = names
    assert long == LONG_FUNCTIONS


def test_names_are_not_banned():
    wrong = {}
    for name in FILES:
        banned = BANNED - ({"into"} if name in MERGING else set())
        if names := banned & {defined.strip("_") for defined in defined_names(name)}:
            wrong[name] = names
    assert not wrong


def test_docstrings_of_functions_begin_with_a_verb():
    """A property's may begin with a noun. The test knows words that begin fragments."""
    wrong = []
    for name in FILES:
        for function in functions(name):
            docstring = ast.get_docstring(function) or "None"
            first = re.match(r"\w*", docstring)[0]
            if not first[:1].isupper() or first in FIRST_WORDS:
                wrong.append(f"{name}:{function.lineno}: {docstring.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
