"""The table of README.md, made from committed results."""

import json
import re

import pytest

from bench.report import readme
from bench.report.readme import BEGIN, END, ENTRIES, Entry
from bench.report.record import ROOT, Damaged


@pytest.fixture
def readme_file(tmp_path, monkeypatch):
    """A README whose table is as made."""
    path = tmp_path / "README.md"
    path.write_text(f"# title\n\n{BEGIN}{readme.make_table()}\n{END}\n\nmore\n")
    monkeypatch.setattr(readme, "README", path)
    return path


def test_the_readme_has_the_table_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.rewrite(text, readme.make_table()) == text, "run `python -m bench readme`"


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((bench/[^)]*)\)", text):
        assert (ROOT / target).exists(), target


def test_the_table_is_short_and_each_row_links_a_committed_result():
    head, rule, *rows = readme.make_table().splitlines()
    assert len(rows) == len(ENTRIES) <= 8 and head.count("|") == rule.count("|") == 5
    for row in rows:
        target = row.rpartition("](")[2].partition(")")[0]
        assert (ROOT / target).exists() and target.startswith("bench/results/")
    assert sum("slower" in row for row in rows) == 1  # the whole training step on the GPU


def test_check_fails_where_table_and_records_differ(readme_file):
    assert readme.main(["--check"]) == 0
    right = readme_file.read_text()
    readme_file.write_text(right.replace("0.51 ms", "0.15 ms", 1))
    assert readme_file.read_text() != right and readme.main(["--check"]) == 1
    assert readme.main([]) == 0 and readme_file.read_text() == right


def test_check_fails_where_a_record_has_changed(readme_file, tmp_path, monkeypatch):
    results = tmp_path / "bench" / "results"
    for entry in ENTRIES:
        source, target = readme.RESULTS / entry.folder, results / entry.folder
        target.mkdir(parents=True, exist_ok=True)
        (target / entry.file).write_bytes((source / entry.file).read_bytes())
    monkeypatch.setattr(readme.make_table, "__defaults__", (ENTRIES, results))
    assert readme.main(["--check"]) == 0
    path = results / readme.CPU / "nf4.json"
    data = json.loads(path.read_text())
    for row in data["rows"]:
        if row["ms_p50"]:
            row["ms_p50"] *= 2
    path.write_text(json.dumps(data))
    assert readme.main(["--check"]) == 1


def test_a_readme_without_its_markers_is_told(readme_file, capsys):
    readme_file.write_text("# title\n")
    assert readme.main([]) == 2
    assert "there is no <!-- bench:begin -->" in capsys.readouterr().err
    with pytest.raises(Damaged, match="bench:end"):
        readme.rewrite(BEGIN, "")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"case": {"op": "linear"}}, "rows with"),
        ({"impls": {"nobody": "pyfast"}}, "0 rows with"),
        ({"figures": (("no such", "ms"),)}, "has no no such"),
        ({"file": "none.json"}, "No such file"),
    ],
)
def test_an_entry_without_its_row_is_told(changes, says):
    fields = vars(ENTRIES[0]) | changes
    with pytest.raises(Damaged, match=says):
        readme.make_table([Entry(**fields)])
