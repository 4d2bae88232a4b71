"""Private names of other libraries: they exist, are used where the table says, and have a test."""

import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from pyfast.hf.private_names import PRIVATE_NAMES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: f"{entry.module}.{entry.name}")
def test_a_private_name_is_as_the_table_says(entry):
    library = entry.module.partition(".")[0]
    source = inspect.getsource(importlib.import_module(entry.module))
    assert entry.name in source, f"{library} {version(library)}; seen in {entry.versions}"
    file, _, test = entry.test.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text()


def test_each_name_is_used_where_the_table_says():
    modules = [path for path in ROOT.glob("pyfast/**/*.py") if path.name != "private_names.py"]
    words = {
        str(path.relative_to(ROOT)): set(re.findall(r"\w+", path.read_text())) for path in modules
    }
    for entry in PRIVATE_NAMES:
        users = [path for path in words if entry.name in words[path]]
        assert set(users) == set(entry.used_in), entry.name
