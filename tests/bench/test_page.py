"""The page of all results, its plots, and the README's figures."""

import json
import pathlib
import re
from importlib import import_module

import pytest

from bench.report import figures, figures_kinds, page, record
from bench.report.figures_blocks import BLOCKS
from bench.report.figures_kinds import Column, Comparison, Line, Results
from bench.report.plots import style, timings
from bench.report.record import Damaged

MACHINE = {
    "cpu": "a <fast> CPU",
    "cores": "2 cores, 2 threads",
    "isa": "AVX512+AVX512-BF16",
    "torch": "2.13.0",
}
MACHINE |= {"date": "2026-01-01 00:00 UTC", "commit": "abc"}
GOALS = [
    {
        "text": "linear M=1: {:.2f}x as fast as torch",
        "sense": ">=",
        "target": 4,
        "value": 5.034,
        "why": "",
    },
    {
        "text": "linear M=64: {:.2f}x the time of torch",
        "sense": "<=",
        "target": 1.2,
        "value": 1.5,
        "why": "",
        "low": 1.4,
        "high": 1.6,
    },
    {
        "text": "linear M=1: {:.0f} % of copy bandwidth",
        "sense": ">=",
        "target": 80,
        "value": None,
        "why": "no GPU & none",
    },
]
PEERS = (
    "nf4.peers",
    "lora.peers",
    "adapter.bench",
    "lsh_attention.peers",
    "reversible.peers",
    "llama.hf_patch_problem",
    "llama.ways",
)
TIMES = {"pyfast": 1.0, "torch": 2.0, "bnb-train": 0.5}


def row(impl: str, m: int, ms: float | None, **more) -> dict:
    times = (
        {}
        if ms is None
        else {"ms_p20": 0.9 * ms, "ms_p80": 1.1 * ms, "peak_mb": 12.0 + m, "held_mb": 8.0}
    )
    work = {"moved_bytes": 1e6, "flops": 2e6 * m, "gb_s": 1.0, "tflop_s": 0.1, "note": ""}
    same = {
        "op": "linear",
        "shape": "64x64",
        "dtype": "bf16",
        "impl": impl,
        "m": m,
        "variant": "",
        "ms_p50": ms,
    }
    return same | times | work | more


def result(**more) -> dict:
    rows = [row(impl, m, ms * m) for m in (1, 16, 64) for impl, ms in TIMES.items()]
    rows.append(row("torchao", 1, None, note="out of memory"))
    rows.append(
        {
            "op": "all",
            "shape": "-",
            "m": None,
            "dtype": "-",
            "impl": "unsloth",
            "ms_p50": None,
            "note": "needs a GPU",
        }
    )
    ceilings = {"copy": 4e10, "gemm bf16": 4e11, "ceiling bf16": 4e11}
    return {
        "bench": "nf4",
        "machine": MACHINE,
        "ceilings": ceilings,
        "rows": rows,
        "goals": GOALS,
    } | more


@pytest.fixture
def folder(tmp_path):
    deep = tmp_path / "cpu-a-machine"
    deep.mkdir()
    (deep / "nf4.json").write_text(json.dumps(result()))
    other = {
        "inputs": "64x64",
        "rows": [
            {
                "dtype": "bf16",
                "impl": "pyfast",
                "blocks": 6,
                "recovered input": 0.0,
                "gradients": 0.0,
            }
        ],
    }
    (deep / "nf4-drift.json").write_text(json.dumps(other))
    gpu = {"bench": "lora", "machine": MACHINE | {"gpu": "NVIDIA H200"}}
    (tmp_path / "lora.json").write_text(json.dumps(result(**gpu)))
    return tmp_path


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def table_rows(html: str) -> list[str]:
    return re.findall(r"<tr.*?</tr>", html, re.S)


def test_every_goal_is_there_with_its_verdict_and_the_missed_ones_are_marked(folder):
    html, md = (path.read_text() for path in page.write(folder))
    rows = {text_of(line).strip(): line for line in table_rows(html)}

    def line(*words):
        return next(found for text, found in rows.items() if all(word in text for word in words))

    assert 'class="good"' in line("linear M=1: ≥ 4x as fast as torch", "5.03x", "met")
    missed = line("linear M=64: ≤ 1.2x the time of torch", "1.50x (1.40x to 1.60x)", "MISSED")
    assert 'class="bad"' in missed and "--at:40%" in missed, "0.8 of the goal"
    assert 'class="open"' in line("≥ 80 % of copy bandwidth", "not measured: no GPU &amp; none")
    assert html.index(missed) < html.index("<h2"), "missed goals come first"
    assert (
        sum("MISSED" in found for found in table_rows(html)) == 4
    )  # of two benches, on top and in place
    assert "| linear M=64: ≤ 1.2x the time of torch | 1.50x (1.40x to 1.60x) | **MISSED** |" in md
    assert "| linear M=1: ≥ 4x as fast as torch | 5.03x | met |" in md


def test_the_page_needs_nothing_else_and_takes_what_it_is_given_for_text(folder):
    html = page.write(folder)[0].read_text()
    assert "<script" not in html and not re.search(r'(src|href)="(?!data:|#)', html)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "prefers-color-scheme: dark" in html
    assert "a &lt;fast&gt; CPU" in html and "<fast>" not in html
    assert "Not run: unsloth (needs a GPU)." in text_of(html) and "out of memory" in html


def test_machines_and_what_was_written_beside_a_result_have_their_places(folder):
    html = page.write(folder, folder / "out" / "page.html")[0].read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html) == [
        "a &lt;fast&gt; CPU, 2 cores, AVX512 + AVX512-BF16",
        "NVIDIA H200",
    ]
    assert html.index(">nf4</h3>") < html.index("recovered input") < html.index("NVIDIA H200</h2>")
    assert (
        html.count("<svg") == 2 * 4 + 1
    )  # roofline, bars, times and memory of two benches; and the drift
    assert (folder / "out" / "page.md").exists()


@pytest.mark.parametrize(
    "text", ["{", '{"rows": 1}', '{"rows": [], "goals": [{"text": "{"}]}', "\xff"]
)
def test_a_damaged_file_is_one_clear_line_and_no_page(folder, capsys, text):
    (folder / "bad.json").write_text(text, encoding="latin-1")
    assert page.main([str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"bench page: {folder / 'bad.json'}: ") and error.count("\n") == 0
    assert not (folder / "index.html").exists()


def test_a_folder_without_results_and_a_wrong_name_are_told(tmp_path, capsys):
    assert page.main([str(tmp_path)]) == 2 and "no results" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        page.main([str(tmp_path), "--out", "page.pdf"])
    assert "must end in .html" in capsys.readouterr().err


def test_a_goal_that_is_missed_by_a_hair_does_not_look_met():
    near = {
        "text": "{:.2f}x the time of torch",
        "sense": "<=",
        "target": 1.33,
        "value": 1.3306,
        "why": "",
    }
    (goal,) = record.Record.of(result(goals=[near])).goals
    assert (goal.figure, goal.verdict) == ("1.331x", "MISSED")


# --- plots ---


def test_bars_are_as_long_as_the_ratios_and_say_them(folder):
    (one,) = [found for found in record.walk(folder) if found.kind == "nf4"]
    (axis,) = timings.bars(one).axes[:1]
    ends = sorted(bar.get_x() + bar.get_width() for bar in axis.patches if bar.get_height() < 0.7)
    assert ends == pytest.approx([0.5] * 3 + [2.0] * 3)
    assert {text.get_text() for text in axis.texts} >= {
        "2.00x",
        "0.50x",
        "1 row",
        "64 rows",
        "pyfast 1.0 ms",
    }


def test_a_ratio_measured_in_turns_goes_before_the_spread_of_the_times():
    mine, theirs = (
        record.Row(**dict.fromkeys(record.NUMBERS) | row("torch", 1, ms)) for ms in (1.0, 2.0)
    )
    assert timings.ratio(theirs, mine) == pytest.approx((1.8 / 1.1, 2, 2.2 / 0.9))
    theirs.times_pyfast, theirs.ratio_p20, theirs.ratio_p80 = 1.95, 1.9, 2.1
    assert timings.ratio(theirs, mine) == (1.9, 1.95, 2.1)


def test_an_implementation_has_its_color_in_every_plot(folder):
    (one,) = [found for found in record.walk(folder) if found.kind == "nf4"]
    for figure in timings.draw(one).values():
        drawn = style.svg(figure, "a figure")
        assert style.color_of("bnb-train") in drawn and style.color_of("torch") in drawn
        assert style.INK not in drawn and "currentColor" in drawn
    assert (
        style.color_of("something new")
        == style.color_of("something new")
        not in style.COLORS.values()
    )


@pytest.mark.parametrize("module", PEERS)
def test_every_implementation_has_a_color_unlike_those_beside_it(module):
    colors = [style.COLORS.get(impl) for impl in import_module(f"bench.{module}").PEERS]
    assert None not in colors and len(set(colors)) == len(colors)


def test_plots_lie_beside_the_results(folder):
    assert timings.main(str(folder)) == 0
    deep = folder / "cpu-a-machine"
    names = {"nf4.png", "nf4-times.png", "nf4-memory.png", "nf4-drift.png", "roofline.png"}
    assert {path.name for path in deep.glob("*.png")} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in deep.glob("*.png"))


def test_the_roofline_has_every_op_at_its_place(folder):
    figure = timings.roofline([found for found in record.walk(folder) if found.kind == "nf4"])
    points = [
        xy
        for line in figure.axes[0].lines
        if line.get_marker() == "o"
        for xy in line.get_xydata().flatten()
    ]
    assert points == pytest.approx([2.0, 2e9, 32.0, 2e9, 128.0, 2e9])


def training_steps() -> record.Record:
    rows = [
        {"way": way, "tokens_per_s": 10.0 * n, "peak_bytes": n * 10**9, "note": ""}
        for n, way in ((1, "pyfast"), (2, "peft"))
    ]
    return record.Record.of(
        {"bench": "whole", "machine": MACHINE, "rows": [*rows, {"way": "none", "note": "missing"}]}
    )


def test_what_is_no_timing_has_its_plot_too(results):
    other = {one.kind: one for one in [*results.records, training_steps()] if not one.rows}
    assert other.keys() >= {"accuracy", "drift", "learning", "duplication", "long_context", "whole"}
    for kind, one in other.items():
        (figure,) = timings.draw(one).values()
        assert any(axis.lines or axis.patches for axis in figure.axes), kind
    steps = [axis for axis in timings.draw(other["whole"])[""].axes]
    assert [bar.get_width() for bar in steps[0].patches] == [10, 20]
    memory = timings.draw(other["long_context"])[""].axes[0]
    assert memory.get_ylim()[0] == 0, "a difference of a percent must not look like more"


# --- figures ---


@pytest.fixture(scope="module")
def results():
    return Results(figures.committed())


def test_the_readme_is_as_its_results_make_it(results):
    text = figures.README.read_text()
    assert figures.rewritten(text, results) == text, "README.md: run `make figures`"
    assert {found[2] for found in figures.MARKED.finditer(text)} == BLOCKS.keys()


def test_a_number_typed_into_the_readme_is_noticed(results):
    text = figures.README.read_text()
    block = next(found for found in figures.MARKED.finditer(text) if found[2] == "nf4")
    number = re.search(r"\d\.\d", block[3])[0]
    typed = text.replace(block[3], block[3].replace(number, "0.1", 1))
    assert typed != text and figures.rewritten(typed, results) == text


def test_the_picture_shows_what_the_results_say(results):
    from PIL import Image

    assert Image.open(figures.PICTURE).text["Comment"] == figures.drawn(figures.bars(results)), (
        "run `make figures`"
    )
    assert figures.PICTURE.relative_to(figures.ROOT).as_posix() in figures.README.read_text()


def test_the_readme_has_at_most_two_pictures_and_its_links_lead_somewhere():
    text = figures.README.read_text()
    assert 1 <= len(re.findall(r"!\[", text)) <= 2
    for target in re.findall(r"\]\((bench/[^)]*)\)", text):
        assert (figures.ROOT / target).exists(), target


@pytest.mark.parametrize(
    "text, says",
    [
        ("<!-- figures: nf4 -->\nno end", "has no end"),
        ("<!-- figures: nf4 -->\n<!-- figures: lora -->\n<!-- end -->", "has no end"),
        ("<!-- figures: nf5 -->\n<!-- end -->", "nf5: there are"),
    ],
)
def test_wrong_marks_are_refused(results, text, says):
    with pytest.raises(Damaged, match=says):
        figures.rewritten(text, results)


def small(*records) -> Results:
    return Results(
        [record.Record.of(found, f"{number}.json") for number, found in enumerate(records)]
    )


TABLE = Comparison(
    "nf4",
    "ms",
    [
        Column("pyfast", ("pyfast",)),
        Column("others", ("none", "torch"), beside="bnb-train"),
        Column("absent", ("none",)),
    ],
    [
        Line("one row", {"op": "linear", "m": 1}),
        Line("memory", {"op": "linear", "m": 1}, "peak_mb", " MB"),
    ],
)


def test_a_table_has_the_best_in_bold_and_gaps_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(figures_kinds, "ROOT", pathlib.Path())
    lines = TABLE(small(result())).splitlines()
    assert lines[0] == "| ms ([record](0.json)) | pyfast | others | absent |"
    assert lines[2] == "| one row | **1.0** | 2.0 (0.50) |  |"
    assert lines[3] == "| memory | **13.0 MB** | **13.0 MB** (13.0 MB) |  |"


def test_the_newest_result_of_a_machine_counts_and_a_missing_one_is_told():
    newer = result(machine=MACHINE | {"date": "2026-02-01 00:00 UTC"})
    elsewhere = result(machine=MACHINE | {"isa": "AVX2", "date": "2026-03-01 00:00 UTC"})
    found = small(result(), newer, elsewhere)
    assert found.of("nf4").date.startswith("2026-02")
    assert found.on("AVX2").of("nf4").date.startswith("2026-03")
    with pytest.raises(Damaged, match="no result of lora"):
        found.of("lora")
    with pytest.raises(Damaged, match="9 timed rows with"):
        found.row("nf4", shape="64x64", note="")


def test_results_of_the_users_own_are_no_figures(monkeypatch, folder):
    """`make bench` leaves its results in a folder beside those of machines."""
    monkeypatch.setattr(figures, "RESULTS", folder)
    mine = folder / "here"
    mine.mkdir()
    (mine / "nf4.json").write_text(json.dumps(result()))
    assert {one.path.parent.name for one in figures.committed()} == {"cpu-a-machine"}
