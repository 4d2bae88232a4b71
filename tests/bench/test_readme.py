"""The table of README.md, made from committed results."""

import json
import re
import shutil

import pytest
from helpers.bench_results import make_result, make_row

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
    "text, says",
    [
        (f"{END}\n{BEGIN}", "there is no <!-- bench:begin --> that <!-- bench:end --> follows"),
        (f"{BEGIN}{BEGIN}{END}", "<!-- bench:begin --> and <!-- bench:end --> may be there only"),
        (f"{BEGIN}{END}{END}", "<!-- bench:begin --> and <!-- bench:end --> may be there only"),
    ],
    ids=["end before begin", "two begins", "two ends"],
)
def test_wrong_marks_are_refused_in_one_line(readme_file, capsys, text, says):
    readme_file.write_text(text)
    assert readme.main([]) == 2 and readme_file.read_text() == text
    error = capsys.readouterr().err
    assert error.startswith(f"bench readme: README.md: {says}") and error.count("\n") == 1


def test_results_of_a_user_never_reach_the_table(readme_file, tmp_path, monkeypatch):
    """`make bench` leaves them in bench/results/here, beside the folders of machines."""
    results = tmp_path / "bench" / "results"
    shutil.copytree(readme.RESULTS, results, ignore=shutil.ignore_patterns("*.png", "*.csv"))
    before = readme.make_table(ENTRIES, results)
    (results / "here").mkdir(exist_ok=True)
    for entry in ENTRIES:
        (results / "here" / entry.file).write_text("{")  # to read one would be an error
    assert readme.make_table(ENTRIES, results) == before and "/here/" not in before
    assert all(entry.folder.startswith(("cpu-", "cuda-")) for entry in ENTRIES)


def make_cells(tmp_path, figures=(("ms_p50", "ms"),), **ms):
    """Return the cells of pyfast and of its peers, made from a result with these times."""
    rows = [make_row(impl, 1, time, rate=time) for impl, time in ms.items()]
    folder = tmp_path / "bench" / "results" / "cpu-a-machine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nf4.json").write_text(json.dumps(make_result(rows=rows)))
    entry = Entry("one", folder.name, "nf4.json", {"m": 1}, {impl: impl for impl in ms}, figures)
    line = readme.make_table([entry], folder.parent).splitlines()[-1]
    return tuple(cell.strip() for cell in line.split("|")[2:4])


@pytest.mark.parametrize(
    "ms, cells",
    [
        ({"pyfast": 1.0, "torch": 2.0}, ("**1.0 ms**", "torch 2.0 ms")),
        ({"pyfast": 2.0, "torch": 1.0}, ("2.0 ms: slower", "torch **1.0 ms**")),
        ({"pyfast": 1.0, "torch": 1.0}, ("**1.0 ms**", "torch **1.0 ms**")),
        (
            {"pyfast": 1.0, "torch": None, "peft": 3.0},
            ("**1.0 ms**", "torch -; peft 3.0 ms"),
        ),
        ({"pyfast": None, "torch": 2.0}, ("-", "torch 2.0 ms")),
        ({"pyfast": None, "torch": None}, ("-", "torch -")),
        ({"pyfast": 1.0}, ("1.0 ms", "-")),
    ],
    ids=str,
)
def test_the_best_is_bold_and_what_was_not_measured_is_a_gap(tmp_path, ms, cells):
    assert make_cells(tmp_path, **ms) == cells


def test_the_highest_rate_is_bold(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "HIGHER_IS_BETTER", {"rate"})
    cells = make_cells(tmp_path, (("rate", "a second"),), pyfast=2.0, torch=1.0)
    assert cells == ("**2.0 a second**", "torch 1.0 a second")


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
