"""Texts for fine-tuning: read and checked, made tokens, dealt out in batches that follow from the step's number."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast.finetune.errors import JobError

IGNORED = -100  # the label of what the loss leaves out
SPLITS = ("train", "test")


class Record(NamedTuple):
    """A text of a file."""

    text: str
    label: str | int | None
    split: str | None
    where: str  # file and line


def read(path: Path, task: str) -> list[Record]:
    """The records of a .jsonl, .csv or, without labels, .txt file."""
    readers = {".jsonl": _json_lines, ".csv": _csv_rows} | (
        {".txt": _plain_text} if task == "lm" else {}
    )
    if path.suffix not in readers:
        raise JobError(
            f"{path} ends in {path.suffix or 'nothing'!r}; data for {task} must be {' or '.join(readers)}"
        )
    newline = "" if path.suffix == ".csv" else None
    try:
        with open(
            path, encoding="utf-8-sig", newline=newline
        ) as file:  # Windows begins files with a mark
            records = [
                _record(path, line, fields, task)
                for line, fields in readers[path.suffix](file, path)
            ]
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is not UTF-8: {error}") from None
    if not records:
        raise JobError(f"{path} holds no records")
    return records


def _json_lines(file, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise JobError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(fields, dict):
                raise JobError(
                    f"{path}, line {number} is {type(fields).__name__}; it must be an object"
                )
            yield number, fields


def _csv_rows(file, path: Path) -> Iterator[tuple[int, dict]]:
    rows, limit = csv.DictReader(file, strict=True), csv.field_size_limit(2**31 - 1)
    try:
        for row in rows:
            if None in row:
                raise JobError(
                    f"{path}, line {rows.line_num} has more fields than the header's {len(rows.fieldnames)}; "
                    'a text with commas must be in "quotes"'
                )
            yield rows.line_num, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise JobError(f"{path}, line {rows.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _plain_text(file, path: Path) -> Iterator[tuple[int, dict]]:
    text = file.read()
    if text.strip():
        yield 1, {"text": text}


def _record(path: Path, line: int, fields: dict, task: str) -> Record:
    where = f"{path}, line {line}"
    text, label, split = fields.get("text"), fields.get("label"), fields.get("split")
    if not isinstance(text, str) or not text.strip():
        raise JobError(f"{where}: text is {_shown(text)}; it must be a string, not empty")
    if task == "classify" and (
        not isinstance(label, str | int) or isinstance(label, bool) or label == ""
    ):
        raise JobError(f"{where}: label is {_shown(label)}; it must be a string or an integer")
    if split not in (None, *SPLITS):
        raise JobError(f"{where}: split is {_shown(split)}; it must be 'train' or 'test'")
    for name, value in (("text", text), ("label", label)):
        if isinstance(value, str) and not _is_unicode(value):
            raise JobError(f"{where}: {name} holds half of a surrogate pair; it must be Unicode")
    return Record(text, label, split, where)


def _shown(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_names(records: Sequence[Record]) -> list[str]:
    """The labels in order: by number if all are integers, else by name."""
    found = {record.label for record in records}
    if not all(isinstance(label, int) for label in found):
        found = set(map(str, found))
    if len(found) < 2:
        raise JobError(f"the only label is {found.pop()!r}; to classify there must be two or more")
    return list(map(str, sorted(found)))


def _classes(records: Sequence[Record], names: Sequence[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(names)}
    for record in records:
        if str(record.label) not in numbers:
            raise JobError(
                f"{record.where}: label is {record.label!r}; the training data has {', '.join(names)}"
            )
    return [numbers[str(record.label)] for record in records]


class Dataset:
    """Token lists, with a class for each, or with none: then every token is the target of those before it."""

    def __init__(
        self, tokens: Sequence[list[int]], classes: Sequence[int] | None, pad: int
    ) -> None:
        self.tokens, self.classes, self.pad = tokens, classes, pad

    def __len__(self) -> int:
        return len(self.tokens)

    def targets(self, rows: Sequence[int]) -> int:
        """How many targets these rows have: what the loss is the mean over."""
        return (
            len(rows)
            if self.classes is not None
            else sum(len(self.tokens[row]) - 1 for row in rows)
        )

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """The model's arguments, padded on the right, and the targets. Of no rows: one that is ignored."""
        texts = [self.tokens[row] for row in rows or [0]]
        ids = torch.full((len(texts), max(map(len, texts))), self.pad)
        mask, following = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
            mask[i, : len(text)] = 1
            following[i, : len(text) - 1] = ids[i, 1 : len(text)]
        targets = (
            following
            if self.classes is None
            else torch.tensor([self.classes[row] for row in rows or [0]])
        )
        if not rows:
            targets.fill_(IGNORED)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, targets.to(device)


Encode = Callable[[str], list[int]]


def classified(
    records: Sequence[Record], names: Sequence[str], encode: Encode, pad: int
) -> Dataset:
    """A text a row."""
    tokens = [encode(record.text) for record in records]
    for record, found in zip(records, tokens):
        if not found:
            raise JobError(f"{record.where}: text {record.text!r} has no tokens")
    return Dataset(tokens, _classes(records, names), pad)


def packed(
    records: Sequence[Record], length: int, encode: Encode, end: int | None, pad: int
) -> Dataset:
    """All texts one after the other, each followed by `end`, cut into rows of `length`."""
    stream = [
        token for r in records for token in [*encode(r.text), *([] if end is None else [end])]
    ]
    rows = [stream[first : first + length] for first in range(0, len(stream), length)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise JobError(
            f"{records[0].where.partition(',')[0]} has {len(stream)} tokens; it must have 2 or more"
        )
    return Dataset(rows, None, pad)


class Order:
    """Which rows each step takes: every row once an epoch, in an order that follows from the seed and the epoch."""

    def __init__(self, rows: int, rows_a_step: int, seed: int) -> None:
        self.rows, self.rows_a_step, self.seed = rows, rows_a_step, seed
        self.steps_an_epoch = math.ceil(rows / rows_a_step)
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def step(self, number: int) -> list[int]:
        """Rows of the step, counted from 0 over all epochs."""
        epoch, within = divmod(number, self.steps_an_epoch)
        if epoch != self._shuffled[0]:
            generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
            self._shuffled = epoch, torch.randperm(self.rows, generator=generator).tolist()
        return self._shuffled[1][within * self.rows_a_step : (within + 1) * self.rows_a_step]


def mixed(*numbers: int) -> int:
    """A seed that follows from the numbers and from their order, of 63 bits (splitmix64's steps)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
