"""The README's measured tables, sentences and picture, made from the result files: `make figures`.

What stands between `<!-- figures: NAME -->` and `<!-- end -->` in README.md is a block of
figures_blocks.BLOCKS, which says which rows of which result it shows, and how. No measured number
is typed, there or here.
"""

import argparse
import hashlib
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

from bench.report import record
from bench.report.figures_blocks import BARS, BLOCKS, NAMES
from bench.report.figures_kinds import Results
from bench.report.plots import style, timings
from bench.report.record import ROOT, Damaged, Record, Row

README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
PICTURE = RESULTS / "summary.png"


def committed() -> list[Record]:
    """Those in the folders of machines; others, such as `here`, are the user's own."""
    folders = [
        path for path in sorted(RESULTS.iterdir()) if path.name.startswith(("cpu-", "cuda-"))
    ]
    return [one for folder in folders for one in record.walk(folder)]


def bars(results: Results) -> dict[str, list[tuple[str, list[Row]]]]:
    """What the picture shows: of each panel the labels, with the rows of pyfast and of its peers."""
    return {
        heading: [
            (label, _named(results.rows(kind, **where), NAMES[kind]))
            for label, kind, where in found
        ]
        for heading, found in BARS.items()
    }


def _named(rows: Sequence[Row], names: Mapping[str, str]) -> list[Row]:
    own = {row.impl: row for row in rows if row.ms_p50}
    return [
        own["pyfast"],
        *(Row(**vars(own[impl]) | {"name": name}) for impl, name in names.items() if impl in own),
    ]


def drawn(found: Mapping[str, list[tuple[str, list[Row]]]]) -> str:
    """A digest of all that a picture shows, kept in its file."""
    shown = [
        (heading, label, getattr(row, "name", row.impl), base.ms_p50, timings.ratio(row, base))
        for heading, own in found.items()
        for label, (base, *peers) in own
        for row in peers
    ]
    return hashlib.sha256(repr(shown).encode()).hexdigest()


def draw(results: Results) -> pathlib.Path:
    found = bars(results)
    style.png(
        PICTURE, timings.summary(found, record.title(results.of("nf4").machine)), about=drawn(found)
    )
    return PICTURE


# --- the README ---

MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.S)


def rewritten(text: str, results: Results) -> str:
    """The README with all its blocks made anew."""
    names = [found[2] for found in MARKED.finditer(text)]
    if text.count("<!-- figures:") != len(names) or any(
        "<!-- figures:" in found[3] for found in MARKED.finditer(text)
    ):
        raise Damaged("README.md: a block of figures has no end: `<!-- end -->`")
    if unknown := set(names) - BLOCKS.keys():
        raise Damaged(
            f"README.md: figures: {', '.join(sorted(unknown))}: there are {', '.join(BLOCKS)}"
        )
    return MARKED.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](results)}\n{found[4]}", text)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.report.figures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="only tell whether README.md is as made: 0 or 1"
    )
    args = parser.parse_args(words)
    try:
        results = Results(committed())
        before = README.read_text()
        after = rewritten(before, results)
    except Damaged as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    if args.check:
        return int(before != after)
    style.write(README, lambda draft: draft.write_text(after))
    timings.write_folder(results.records)
    print(f"written: {README}, {draw(results)}, and the plots beside the results")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
