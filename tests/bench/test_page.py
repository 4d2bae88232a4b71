"""The page of all results, and docs/benchmarks.md, which is one."""

import json
import re

import pytest
from helpers.bench_results import GOALS, MACHINE, make_result, make_row, write_results

from bench.report import page, record
from bench.report.record import ROOT


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path)
    return tmp_path


def make_page(folder, out):
    return page.make_page(record.read_folder(folder), out, "python -m bench page DIR")


def test_every_goal_is_there_with_its_verdict_and_the_missed_ones_come_first(folder):
    text = make_page(folder, folder)
    lines = text.splitlines()
    missed = "| linear M=64: ≤ 1.2x the time of torch | 1.50x (1.40x to 1.60x) | **MISSED** |"
    assert lines.count(missed) == 2  # in place, of two benches
    assert lines.count("| linear M=1: ≥ 4x as fast as torch | 5.03x | met |") == 2
    on_top = f"| nf4 | a &lt;fast> CPU, 2 cores, AVX512 + AVX512-BF16 {missed}"
    assert on_top in lines and lines.index(on_top) < lines.index("## NVIDIA H200")
    assert "2 goals met, **2 missed**, 2 not measured." in lines
    assert r"| linear M=1: ≥ 80 % of copy bandwidth |  | not measured: no GPU \| none |" in lines


def test_what_could_not_run_is_told(folder):
    text = make_page(folder, folder)
    assert "Not run: unsloth (needs a GPU)." in text
    assert "Without a time: torchao (out of memory; rows: 1)." in text


NAME = "a|b<i>`c\\|d\ne&lt;"
SHOWN = r"a\|b&lt;i>\`c\\\|d e&amp;lt;"


def test_names_and_notes_cannot_break_a_table_or_the_page(tmp_path):
    rows = [{"dtype": NAME, "impl": NAME, "blocks": 6, NAME: 1.0}]
    drift = make_result(bench="drift", rows=rows, goals=[], about=NAME)
    timed = make_result(rows=[make_row(NAME, 1, None, note=NAME)], goals=[GOALS[2] | {"why": NAME}])
    (tmp_path / "drift.json").write_text(json.dumps(drift))
    (tmp_path / "nf4.json").write_text(json.dumps(timed | {"flags": "--peers `a|<b>"}))
    text = make_page(tmp_path, tmp_path)
    assert f"Without a time: {SHOWN} ({SHOWN}; rows: 1)." in text
    assert f"not measured: {SHOWN} |" in text and "`--peers 'a|<b>`" in text
    assert f"| dtype | impl | blocks | {SHOWN} |" in text
    assert f"| {SHOWN} | {SHOWN} | 6 | 1 |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    for block in tables:
        columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block


def test_results_of_a_user_are_not_on_the_page_of_machines(folder):
    (folder / "here").mkdir()
    result = make_result(machine=MACHINE | {"cpu": "a user's CPU"})
    (folder / "here" / "nf4.json").write_text(json.dumps(result))
    assert page.main([str(folder)]) == 0 and page.main([str(folder / "here")]) == 0
    assert "a user's CPU" not in (folder / "index.md").read_text()
    assert "a user's CPU" in (folder / "here" / "index.md").read_text()


def test_machines_and_what_was_written_beside_a_result_have_their_places(folder):
    text = make_page(folder, folder)
    machines = ["a &lt;fast> CPU, 2 cores, AVX512 + AVX512-BF16", "NVIDIA H200"]
    assert re.findall(r"^## (.*)$", text, re.M) == ["Goals", *machines]
    places = [text.index(part) for part in ("### nf4", "recovered input", "## NVIDIA H200")]
    assert places == sorted(places)


def test_links_and_plots_are_relative_to_the_page(folder):
    out = folder / "docs" / "page.md"
    assert page.main([str(folder), "--out", str(out)]) == 0
    text = out.read_text()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert all((out.parent / target).resolve().exists() for target in targets)
    endings = ("nf4.json", "nf4.csv", "nf4.png", "nf4-times.png", "nf4-memory.png", "roofline.png")
    for ending in endings:
        assert f"../cpu-a-machine/{ending}" in targets


def test_plots_that_exist_are_kept_unless_they_are_to_be_drawn_again(folder):
    plot = folder / "cpu-a-machine" / "nf4.png"
    plot.write_bytes(b"by hand")
    assert page.main([str(folder)]) == 0
    assert plot.read_bytes() == b"by hand" and (folder / "index.md").exists()
    assert page.main([str(folder), "--redraw"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "text", ["{", '{"rows": 1}', '{"rows": [], "goals": [{"text": "{"}]}', "\xff"]
)
def test_a_damaged_file_is_one_clear_line_and_no_page(folder, capsys, text):
    (folder / "bad.json").write_text(text, encoding="latin-1")
    assert page.main([str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"bench page: {folder / 'bad.json'}: ") and error.count("\n") == 0
    assert not (folder / "index.md").exists()


def test_a_folder_without_results_and_a_wrong_name_are_told(tmp_path, capsys):
    assert page.main([str(tmp_path)]) == 2 and "no results" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        page.main([str(tmp_path), "--out", "page.pdf"])
    assert "must end in .md" in capsys.readouterr().err


def test_docs_benchmarks_is_as_its_command_makes_it():
    """The command is in the page's second paragraph."""
    path = ROOT / "docs" / "benchmarks.md"
    command = re.search(r"Generated by `(.*?)`", path.read_text())[1]
    assert command == "python -m bench page bench/results --out docs/benchmarks.md"
    records = [
        one
        for folder in (
            "cpu-amd-epyc-2c-avx2",
            "cpu-amd-epyc-2c-avx512-avx512-bf16",
            "cuda-nvidia-h200",
        )
        for one in record.read_folder(ROOT / "bench/results" / folder)
    ]
    assert page.make_page(records, path.parent, command) == path.read_text(), f"run `{command}`"


# --- reading ---


def test_all_committed_results_can_be_read():
    records = record.read_folder(ROOT / "bench/results")
    assert {one.subject for one in records} >= {"nf4", "lora", "drift", "accuracy", "learning"}
    assert all(one.machine for one in records)


def test_operations_of_earlier_files_have_their_new_names():
    data = make_result()
    for row in data["rows"][:3]:
        row["op"] = "quantise"
    one = record.Record.from_data(data)
    assert {row.op for row in one.rows} == {"quantize", "linear"}


def test_a_goal_that_is_missed_by_a_hair_does_not_look_met():
    near = {
        "text": "{:.2f}x the time of torch",
        "sense": "<=",
        "target": 1.33,
        "value": 1.3306,
        "why": "",
    }
    (goal,) = record.Record.from_data(make_result(goals=[near])).goals
    assert (goal.figure, goal.verdict) == ("1.331x", "MISSED")
