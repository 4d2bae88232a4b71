"""Files of a run: each is written as a whole or not at all."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def write_atomically(path: pathlib.Path, save: Callable[[pathlib.Path], object]) -> None:
    """Let `save` write a draft beside `path`, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    text = json.dumps(report, indent=1) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text))


def write_csv(
    path: pathlib.Path, rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]
) -> None:
    """Write rows as CSV, a line each.

    The conditions are repeated on every line, so that files can be joined.
    """
    sheet = io.StringIO()
    lines = [{**row, **machine} for row in rows]
    writer = csv.DictWriter(sheet, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, lambda draft: draft.write_text(sheet.getvalue()))
