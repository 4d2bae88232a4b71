"""Markdown: headings, tables, links and folds, as GitHub shows them."""

import os.path
import pathlib
import re
from collections.abc import Sequence


def heading(level: int, text: str) -> str:
    return f"{'#' * level} {text}"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in a paragraph or a table's cell, on one line."""
    text = " ".join(text.splitlines()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\|`]", r"\\\g<0>", text)


def code(text: str) -> str:
    """Return a code span, outside of tables; a backtick in the text would end it."""
    shown = " ".join(text.splitlines()).replace("`", "'")
    return f"`{shown}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; its cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fold(title: str, content: str) -> str:
    """Return a part that is closed until a reader opens it."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def link(text: str, path: pathlib.Path, folder: pathlib.Path) -> str:
    """Return a link to a file, for a page in `folder`."""
    return f"[{text}]({relative(path, folder)})"


def image(text: str, path: pathlib.Path, folder: pathlib.Path) -> str:
    """Return an image, for a page in `folder`."""
    return f"![{text}]({relative(path, folder)})"


def relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(path, folder)).as_posix()
