"""The texts that come with the package."""

from collections import Counter
from pathlib import Path

import pytest

import pyfast
from pyfast.data import label_names, read

FOLDER = Path(pyfast.__file__).parent / "demo_data"
CASES = {
    "sentiment": (["negative", "positive"], {"train": 192, "test": 48}),
    "topic": (["food", "technology", "travel"], {"train": 60, "test": 20}),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_are_balanced_in_both_splits(name):
    records = read(FOLDER / f"{name}.jsonl", "classify")
    names, sizes = CASES[name]
    assert label_names(records) == names
    assert Counter((r.label, r.split) for r in records) == {(n, split): k for n in names for split, k in sizes.items()}


def test_no_text_comes_twice():
    records = [r for name in CASES for r in read(FOLDER / f"{name}.jsonl", "classify")]
    words = [frozenset(r.text.lower().strip(".?!").split()) for r in records]
    assert len(set(words)) == len(records) and all(4 <= len(text) <= 30 for text in words)
