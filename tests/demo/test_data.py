"""The texts that come with the package."""

import re
from collections import Counter
from pathlib import Path

import pytest

import pyfast
from pyfast.finetune.data import label_names, read_records

FOLDER = Path(pyfast.__file__).parent / "demo" / "data"
CASES = {
    "sentiment": (["negative", "positive"], {"train": 165, "test": 109}),
    "topic": (["food", "technology", "travel"], {"train": 88, "test": 32}),
}


def words(text):
    return re.findall(r"[a-z']+", text.lower())


@pytest.mark.parametrize("name", CASES)
def test_labels_are_balanced_in_both_splits(name):
    records = read_records(FOLDER / f"{name}.jsonl", "classify")
    names, sizes = CASES[name]
    assert label_names(records) == names
    assert Counter((r.label, r.split) for r in records) == {
        (n, split): k for n in names for split, k in sizes.items()
    }


def test_no_text_comes_twice():
    records = [r for name in CASES for r in read_records(FOLDER / f"{name}.jsonl", "classify")]
    found = [tuple(words(r.text)) for r in records]
    assert len(set(found)) == len(records) and all(4 <= len(text) <= 30 for text in found)


def test_no_text_to_judge_by_is_nearly_one_to_learn_from():
    for name in CASES:
        records = read_records(FOLDER / f"{name}.jsonl", "classify")
        learned = [(set(words(r.text)), r.label) for r in records if r.split == "train"]
        for r in records:
            if r.split == "test":
                own = set(words(r.text))
                nearest = max(
                    len(own & other) / len(own | other)
                    for other, label in learned
                    if label == r.label
                )
                assert nearest < 0.5, r.text


def test_lengths_and_endings_tell_nothing():
    """A label must not be known by anything but what is said."""
    records = read_records(FOLDER / "sentiment.jsonl", "classify")
    for feature in (
        lambda t: len(words(t)),
        lambda t: t.count(","),
        lambda t: t.count(";") + t.count(":"),
    ):
        means = {}
        for label in ("positive", "negative"):
            values = [feature(r.text) for r in records if r.label == label]
            means[label] = sum(values) / len(values)
        low, high = sorted(means.values())
        assert high <= 1.15 * low


def test_reviews_are_long_and_no_sentence_to_judge_by():
    reviews = (FOLDER / "reviews.txt").read_text().splitlines()
    assert len(set(reviews)) == len(reviews) == 80 and all(
        len(words(text)) >= 25 for text in reviews
    )
    judged = [
        words(r.text)
        for r in read_records(FOLDER / "sentiment.jsonl", "classify")
        if r.split == "test"
    ]
    assert not [
        text
        for text in judged
        if any(" ".join(text) in " ".join(words(review)) for review in reviews)
    ]
