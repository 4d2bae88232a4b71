"""A document of few kinds of blocks, as one HTML page that needs nothing else, or as Markdown."""

import base64
import html
import os.path
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

GOOD, BAD, OPEN = "met", "MISSED", "not measured"  # marks of a cell, beside which its row is told


@dataclass
class Heading:
    level: int
    text: str
    under: str = ""  # the heading above, where several have one text

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.under} {self.text}".lower()).strip("-")


@dataclass
class Text:
    text: str
    kind: str = ""  # lead, note or nothing


@dataclass
class Counts:
    """Figures to be seen first: (number, word, mark)."""

    counts: list[tuple[int, str, str]]


@dataclass
class Contents:
    """Links to headings."""

    headings: list[Heading]


@dataclass
class Table:
    head: Sequence[str]
    rows: list[Sequence[str]]
    meters: dict[str, Sequence[float | None]] = field(
        default_factory=dict
    )  # by column: bars about 1, beside the words


@dataclass
class Picture:
    """An SVG, or a PNG; in Markdown the PNG, where there is one."""

    label: str
    svg: str = ""
    png: pathlib.Path | None = None


@dataclass
class Fold:
    """Closed until it is wanted."""

    title: str
    blocks: list = field(default_factory=list)


Block = Heading | Text | Counts | Contents | Table | Picture | Fold

STYLE = pathlib.Path(__file__).with_name("page.css").read_text()


def html_page(title: str, blocks: Sequence[Block]) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join(_html(block) for block in blocks)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{block.anchor}">{html.escape(text)}</h{level}>'
        case Text(text, kind):
            return (
                f'<p class="{kind}">{html.escape(text)}</p>'
                if kind
                else f"<p>{html.escape(text)}</p>"
            )
        case Counts(counts):
            each = (
                f'<div class="{_class(mark)}"><b>{n}</b>{html.escape(word)}</div>'
                for n, word, mark in counts
            )
            return f'<div class="counts">{"".join(each)}</div>'
        case Contents(headings):
            tops = {2: ' class="top"'}
            each = (
                f'<a href="#{h.anchor}"{tops.get(h.level, "")}>{html.escape(h.text)}</a>'
                for h in headings
            )
            return f"<nav>{''.join(each)}</nav>"
        case Table():
            return _table(block)
        case Picture(label, svg, png):
            if svg:
                return f"<figure>{svg}</figure>"
            data = base64.b64encode(png.read_bytes()).decode()
            return f'<figure><img alt="{html.escape(label)}" src="data:image/png;base64,{data}"></figure>'
        case Fold(title, blocks):
            return f"<details><summary>{html.escape(title)}</summary>{''.join(map(_html, blocks))}</details>"


def _class(mark: str) -> str:
    return {GOOD: "good", BAD: "bad"}.get(mark, "open" if mark.startswith(OPEN) else "")


def _mark(row: Sequence[str]) -> str:
    """The last cell's, where it is one."""
    return row[-1] if row and _class(row[-1]) else ""


NUMBER = re.compile(r"-?[\d.,]+(e[-+]\d+)?x?($|[ ,][\d(%GM]| to )")  # and what may follow one


def _numeric(rows: list[Sequence[str]]) -> list[bool]:
    columns = [[cell for cell in column if cell not in ("", "-")] for column in zip(*rows)]
    return [bool(own) and all(map(NUMBER.match, own)) for own in columns]


def _table(block: Table) -> str:
    numeric = _numeric(block.rows)
    sides = [' class="number"' if right else "" for right in numeric]
    head = "".join(f"<th{side}>{html.escape(name)}</th>" for name, side in zip(block.head, sides))
    lines = []
    meters = {
        block.head.index(name): values
        for name, values in block.meters.items()
        if name in block.head
    }
    for number, row in enumerate(block.rows):
        bars = {at: _meter(values[number]) for at, values in meters.items()}
        words = [html.escape(cell) + bars.get(at, "") for at, cell in enumerate(row)]
        cells = [f"<td{side}>{word}</td>" for word, side in zip(words, sides)]
        mark = _mark(row)
        if mark:
            cells[-1] = f'<td class="verdict">{html.escape(row[-1])}</td>'
        lines.append(
            (f'<tr class="{_class(mark)}">' if mark else "<tr>") + "".join(cells) + "</tr>"
        )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _meter(value: float | None) -> str:
    """1 is the middle."""
    return (
        ""
        if value is None
        else f'<span class="meter" style="--at:{50 * min(value, 2):.0f}%"></span>'
    )


def markdown(blocks: Sequence[Block], folder: pathlib.Path) -> str:
    """For a file in `folder`, from which its pictures are linked."""
    return "\n\n".join(filter(None, (_markdown(block, folder) for block in blocks))) + "\n"


def _markdown(block: Block, folder: pathlib.Path) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Counts(counts):
            return ", ".join(
                f"**{n} {word}**" if mark == BAD and n else f"{n} {word}"
                for n, word, mark in counts
            )
        case Contents(headings):
            return "\n".join(f"{'  ' * (h.level - 2)}- {h.text}" for h in headings)
        case Table(head, rows):
            return markdown_table(
                head, [[f"**{c}**" if c == BAD else c for c in row] for row in rows]
            )
        case Picture(label, _, png):
            return f"![{label}]({relative(png, folder)})" if png else ""
        case Fold(title, blocks):
            return f"<details><summary>{title}</summary>\n\n{markdown(blocks, folder)}\n</details>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(path, folder)).as_posix()
