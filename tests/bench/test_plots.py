"""Plots of results."""

from importlib import import_module

import pytest
from helpers.bench_results import MACHINE, make_row, write_results

from bench.report import record
from bench.report.plots import bars, files, roofline, style
from bench.report.record import ROOT, Record

PEERS = (
    "bench.nf4.peers",
    "bench.lora.peers",
    "bench.adapter.bench",
    "bench.lsh_attention.peers",
    "bench.reversible.peers",
    "bench.llama.hf_patch_problem",
    "bench.llama.methods",
)


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path)
    return tmp_path


@pytest.fixture
def nf4(folder):
    return record.read(folder / "cpu-a-machine" / "nf4.json")


def test_bars_are_as_long_as_the_ratios_and_say_them(nf4):
    (axis,) = bars.draw_bars(nf4).axes[:1]
    ends = sorted(bar.get_x() + bar.get_width() for bar in axis.patches if bar.get_height() < 0.7)
    assert ends == pytest.approx([0.5] * 3 + [2.0] * 3)
    texts = {text.get_text() for text in axis.texts}
    assert texts >= {"2.00x", "0.50x", "1 row", "64 rows", "pyfast 1.0 ms"}


def test_a_ratio_measured_in_turns_goes_before_the_spread_of_the_times():
    empty = dict.fromkeys(record.NUMBERS)
    pyfast, peer = (record.Row(**empty | make_row("torch", 1, ms)) for ms in (1.0, 2.0))
    assert bars.time_ratio(peer, pyfast) == pytest.approx((1.8 / 1.1, 2, 2.2 / 0.9))
    peer.times_pyfast, peer.ratio_p20, peer.ratio_p80 = 1.95, 1.9, 2.1
    assert bars.time_ratio(peer, pyfast) == (1.9, 1.95, 2.1)


def drawn_colors(figure) -> set[str]:
    colors = import_module("matplotlib.colors")
    parts = [part for axis in figure.axes for part in (*axis.lines, *axis.patches)]
    faces = [p.get_color() if hasattr(p, "get_color") else p.get_facecolor() for p in parts]
    return {colors.to_hex(face) for face in faces}


def test_an_implementation_has_its_color_in_every_plot(nf4):
    for figure in files.draw(nf4).values():
        assert drawn_colors(figure) >= {style.color_of("bnb-train"), style.color_of("torch")}
    new = style.color_of("something new")
    assert new == style.color_of("something new") and new not in style.COLORS.values()


@pytest.mark.parametrize("module", PEERS)
def test_every_implementation_has_a_color_unlike_those_beside_it(module):
    colors = [style.COLORS.get(impl) for impl in import_module(module).PEERS]
    assert None not in colors and len(set(colors)) == len(colors)


def test_plots_lie_beside_the_results(folder):
    files.write_plots(record.read_folder(folder))
    machine_folder = folder / "cpu-a-machine"
    names = {"nf4.png", "nf4-times.png", "nf4-memory.png", "nf4-drift.png", "roofline.png"}
    assert {path.name for path in machine_folder.glob("*.png")} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in machine_folder.glob("*.png"))


def test_the_roofline_has_every_op_at_its_place(nf4):
    axis = roofline.draw_roofline([nf4]).axes[0]
    points = []
    for line in axis.lines:
        if line.get_marker() == "o":
            points += line.get_xydata().flatten().tolist()
    assert points == pytest.approx([2.0, 2e9, 32.0, 2e9, 128.0, 2e9])


def training_steps() -> Record:
    rows = [
        {"way": method, "tokens_per_s": 10.0 * n, "peak_bytes": n * 10**9, "note": ""}
        for n, method in ((1, "pyfast"), (2, "peft"))
    ]
    rows.append({"way": "none", "note": "missing"})
    return Record.from_data({"bench": "whole", "machine": MACHINE, "rows": rows})


def test_what_is_no_timing_has_its_plot_too():
    committed = record.read_folder(ROOT / "bench/results")
    others = {one.subject: one for one in [*committed, training_steps()] if not one.rows}
    assert others.keys() >= {"accuracy", "drift", "learning", "duplication", "whole"}
    for subject, one in others.items():
        (figure,) = files.draw(one).values()
        assert any(axis.lines or axis.patches for axis in figure.axes), subject
    speed = files.draw(others["whole"])[""].axes[0]
    assert [bar.get_width() for bar in speed.patches] == [10, 20]
    memory = files.draw(others["long_context"])[""].axes[0]
    assert memory.get_ylim()[0] == 0, "a difference of a percent must not look like more"
