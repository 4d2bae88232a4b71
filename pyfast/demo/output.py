"""The demo's output directory: checked, written aside, and put in its place as a whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyfast.demo import page, report
from pyfast.finetune.errors import JobError
from pyfast.finetune.output_files import write_json
from pyfast.formats import file_io

# All that the output directory holds.
NAMES = {"report.html", "table.md", "metrics.json", "charts", "model", "sentiment", "topic"}


def check(out: Path) -> None:
    """Raise JobError if the output directory cannot be, or holds what no demo wrote."""
    if out.exists() and not out.is_dir():
        raise JobError(f"--out {out} is a file; it must be a directory, or new")
    if out.exists() and (others := sorted(set(os.listdir(out)) - NAMES)):
        raise JobError(
            f"--out {out} holds {others[0]}, which no demo wrote; "
            "it must be new, empty or an earlier demo's"
        )


@contextmanager
def replace_directory(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `out` at the end.

    After an error or Ctrl-C `out` is as it was.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
        file_io.sync(parent)


def write(facts: dict, folder: Path, out: Path) -> None:
    """Write the measurements, the charts and the report to the folder that becomes `out`."""
    write_json(folder / "metrics.json", facts)
    (folder / "charts").mkdir()
    for name, chart in report.draw_charts(facts).items():
        (folder / "charts" / f"{name}.svg").write_text(chart)
    (folder / "table.md").write_text(report.write_markdown(facts))
    (folder / "report.html").write_text(page.write_html(facts, str(out)))
