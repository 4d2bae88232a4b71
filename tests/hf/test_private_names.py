"""Private names of other libraries: they exist, are used where the table says, and have a test."""

import importlib
import inspect
import io
import tokenize
from importlib.metadata import version
from pathlib import Path

import pytest

from pyfast.hf.private_names import PRIVATE_NAMES

ROOT = Path(__file__).parents[2]


def code_names(source: str) -> set[str]:
    """Return the names in code, and strings that are one name, as getattr takes; no comments."""
    names = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            names.add(token.string)
        elif token.type == tokenize.STRING:
            names.add(token.string.strip("'\""))
    return names


def test_a_name_in_a_comment_or_in_a_longer_name_is_not_there():
    source = '# _old\n"""It had _old."""\nm._old_forward = getattr(m, "_hook")\n'
    assert {"_old_forward", "_hook"} <= code_names(source) and "_old" not in code_names(source)


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: f"{entry.module}.{entry.name}")
def test_a_private_name_is_as_the_table_says(entry):
    library = entry.module.partition(".")[0]
    source = inspect.getsource(importlib.import_module(entry.module))
    names = code_names(source)
    assert entry.name in names, f"{library} {version(library)}; seen in {entry.versions}"
    file, _, test = entry.test.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text()


def test_each_name_is_used_where_the_table_says():
    modules = [path for path in ROOT.glob("pyfast/**/*.py") if path.name != "private_names.py"]
    words = {str(path.relative_to(ROOT)): code_names(path.read_text()) for path in modules}
    for entry in PRIVATE_NAMES:
        users = [path for path in words if entry.name in words[path]]
        assert set(users) == set(entry.used_in), entry.name
