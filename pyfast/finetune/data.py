"""Texts for fine-tuning: read from files, checked, tokenized, and dealt out in batches.

Which rows a step takes follows from the seed and the step's number.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast.finetune.errors import JobError

IGNORED = -100  # target of positions that the loss leaves out
SPLITS = ("train", "test")
Encode = Callable[[str], list[int]]


# --- files ---


class Record(NamedTuple):
    """A text of a data file, with its label and split if it has them."""

    text: str
    label: str | int | None
    split: str | None
    location: str  # file and line, for error messages


def read_records(path: Path, task: str) -> list[Record]:
    """Read the records of a .jsonl or .csv file or, for the task "lm", of a .txt file.

    Raises:
        JobError: the file cannot be read, or a record is not as the task needs it.
    """
    readers = {".jsonl": _read_json_lines, ".csv": _read_csv}
    if task == "lm":
        readers[".txt"] = _read_plain_text
    if path.suffix not in readers:
        ending, expected = repr(path.suffix or "nothing"), " or ".join(readers)
        raise JobError(f"{path} ends in {ending}; data for {task} must be {expected}")
    newline = "" if path.suffix == ".csv" else None
    try:
        # utf-8-sig: files that Windows writes begin with a byte order mark
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            lines = readers[path.suffix](file, path)
            records = [_make_record(path, line, fields, task) for line, fields in lines]
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is not UTF-8: {error}") from None
    if not records:
        raise JobError(f"{path} holds no records")
    return records


def _read_json_lines(file, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise JobError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(fields, dict):
                json_type = type(fields).__name__
                raise JobError(f"{path}, line {number} is {json_type}; it must be an object")
            yield number, fields


def _read_csv(file, path: Path) -> Iterator[tuple[int, dict]]:
    rows, limit = csv.DictReader(file, strict=True), csv.field_size_limit(2**31 - 1)
    try:
        for row in rows:
            if None in row:
                raise JobError(
                    f"{path}, line {rows.line_num} has more fields than the header's "
                    f'{len(rows.fieldnames)}; a text with commas must be in "quotes"'
                )
            yield rows.line_num, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise JobError(f"{path}, line {rows.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _read_plain_text(file, path: Path) -> Iterator[tuple[int, dict]]:
    text = file.read()
    if text.strip():
        yield 1, {"text": text}


def _make_record(path: Path, line: int, fields: dict, task: str) -> Record:
    """Return the record of a line after checking its text, label and split."""
    location = f"{path}, line {line}"
    text, label, split = fields.get("text"), fields.get("label"), fields.get("split")
    if not isinstance(text, str) or not text.strip():
        raise JobError(f"{location}: text is {_quote(text)}; it must be a string, not empty")
    if task == "classify" and not _is_label(label):
        raise JobError(f"{location}: label is {_quote(label)}; it must be a string or an integer")
    if split not in (None, *SPLITS):
        raise JobError(f"{location}: split is {_quote(split)}; it must be 'train' or 'test'")
    for name, value in (("text", text), ("label", label)):
        if isinstance(value, str) and not _is_unicode(value):
            raise JobError(f"{location}: {name} holds half of a surrogate pair; it must be Unicode")
    return Record(text, label, split, location)


def _is_label(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _quote(value: object) -> str:
    """Return the value as an error message shows it, in at most 60 characters."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_names(records: Sequence[Record]) -> list[str]:
    """Return the labels in order: by number if all are integers, else by name."""
    labels = {record.label for record in records}
    if not all(isinstance(label, int) for label in labels):
        labels = set(map(str, labels))
    if len(labels) < 2:
        raise JobError(f"the only label is {labels.pop()!r}; to classify there must be two or more")
    return list(map(str, sorted(labels)))


# --- datasets ---


class Dataset:
    """Rows of tokens, each with a class; without classes, the target of a token is the next one.

    Args:
        tokens: the token ids of each row.
        classes: the class of each row, or None for a language model.
        pad: the token id that fills a batch's shorter rows.
    """

    def __init__(
        self, tokens: Sequence[list[int]], classes: Sequence[int] | None, pad: int
    ) -> None:
        self.tokens, self.classes, self.pad = tokens, classes, pad

    def __len__(self) -> int:
        return len(self.tokens)

    def count_targets(self, rows: Sequence[int]) -> int:
        """Return how many targets these rows have; the loss is the mean over them."""
        if self.classes is not None:
            return len(rows)
        return sum(len(self.tokens[row]) - 1 for row in rows)

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's arguments, padded on the right, and the targets.

        Without rows the batch is the first row with targets that the loss ignores, so that a
        process that has nothing to do still runs the model.
        """
        chosen = rows or [0]
        texts = [self.tokens[row] for row in chosen]
        ids = torch.full((len(texts), max(map(len, texts))), self.pad)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
            mask[i, : len(text)] = 1
            targets[i, : len(text) - 1] = ids[i, 1 : len(text)]
        if self.classes is not None:
            targets = torch.tensor([self.classes[row] for row in chosen])
        if not rows:
            targets.fill_(IGNORED)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, targets.to(device)


def classification_dataset(
    records: Sequence[Record], names: Sequence[str], encode: Encode, pad: int
) -> Dataset:
    """Build a classification dataset with one text per row; classes are numbered as `names`."""
    tokens = [encode(record.text) for record in records]
    for record, text in zip(records, tokens):
        if not text:
            raise JobError(f"{record.location}: text {record.text!r} has no tokens")
    return Dataset(tokens, _number_labels(records, names), pad)


def _number_labels(records: Sequence[Record], names: Sequence[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(names)}
    for record in records:
        if str(record.label) not in numbers:
            known = ", ".join(names)
            raise JobError(
                f"{record.location}: label is {record.label!r}; the training data has {known}"
            )
    return [numbers[str(record.label)] for record in records]


def language_dataset(
    records: Sequence[Record], length: int, encode: Encode, end: int | None, pad: int
) -> Dataset:
    """Join all texts, each followed by the token `end`, and cut them into rows of `length`."""
    stream = []
    for record in records:
        stream += encode(record.text)
        if end is not None:
            stream.append(end)
    rows = [stream[first : first + length] for first in range(0, len(stream), length)]
    rows = [row for row in rows if len(row) > 1]  # a single token has no target
    if not rows:
        file = records[0].location.partition(",")[0]
        raise JobError(f"{file} has {len(stream)} tokens; it must have 2 or more")
    return Dataset(rows, None, pad)


# --- order ---


class RowOrder:
    """The rows of each step: every row once an epoch, shuffled by the seed and the epoch's number.

    Example:
        >>> from pyfast.finetune.data import RowOrder
        >>> order = RowOrder(rows=5, rows_per_step=2, seed=0)
        >>> [len(order.rows_of_step(step)) for step in range(order.steps_per_epoch)]
        [2, 2, 1]
    """

    def __init__(self, rows: int, rows_per_step: int, seed: int) -> None:
        self.rows, self.rows_per_step, self.seed = rows, rows_per_step, seed
        self.steps_per_epoch = math.ceil(rows / rows_per_step)
        self._shuffled: tuple[int, list[int]] = (-1, [])  # an epoch and its order

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of a step, counted from 0 over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._shuffled[0]:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._shuffled = epoch, torch.randperm(self.rows, generator=generator).tolist()
        first = step_in_epoch * self.rows_per_step
        return self._shuffled[1][first : first + self.rows_per_step]


def mix_seed(*numbers: int) -> int:
    """Return a seed of 63 bits that depends on the numbers and their order (splitmix64's steps)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
