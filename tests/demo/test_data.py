"""Tests of the texts that come with the package."""

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
    texts = [tuple(words(r.text)) for r in records]
    assert len(set(texts)) == len(records) and all(4 <= len(text) <= 30 for text in texts)


def test_no_test_text_is_almost_a_training_text():
    for name in CASES:
        records = read_records(FOLDER / f"{name}.jsonl", "classify")
        training = [(set(words(r.text)), r.label) for r in records if r.split == "train"]
        for r in records:
            if r.split == "test":
                text = set(words(r.text))
                others = [other for other, label in training if label == r.label]
                overlap = max(len(text & other) / len(text | other) for other in others)
                assert overlap < 0.5, r.text


def test_lengths_and_signs_do_not_give_the_label_away():
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


def test_reviews_are_long_and_hold_no_test_text():
    reviews = (FOLDER / "reviews.txt").read_text().splitlines()
    assert len(set(reviews)) == len(reviews) == 80
    assert all(len(words(text)) >= 25 for text in reviews)
    joined = [" ".join(words(review)) for review in reviews]
    for record in read_records(FOLDER / "sentiment.jsonl", "classify"):
        if record.split == "test":
            text = " ".join(words(record.text))
            assert not any(text in review for review in joined)
