"""Tests of the demo in its quick size: what it prints and writes, and what a stop leaves."""

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pyfast
from pyfast._support import measure
from pyfast.cli.main import main
from pyfast.demo import charts, output, report, texts
from pyfast.demo import page as demo_page
from pyfast.demo import run as demo

METHODS = ["full", "selective", "adapter, Houlsby", "adapter, Pfeiffer", "LoRA", "DoRA", "QLoRA"]
ROOT = Path(pyfast.__file__).parent.parent


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run the command; return what it printed, and its directory."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words = [sys.executable, "-m", "pyfast", "demo", "--quick", "--out", str(out)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run, out


@pytest.fixture(scope="module")
def facts(ran):
    return json.loads((ran[1] / "metrics.json").read_text())


# --- what it prints and measures ---


def test_it_writes_its_files_and_nothing_else(ran):
    run, out = ran
    assert {path.name for path in out.iterdir()} == output.NAMES
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert str(out / "report.html") in run.stdout and run.stderr == ""
    assert max(map(len, run.stdout.splitlines()[:-1])) <= 100


def test_every_method_has_a_row_everywhere(ran, facts):
    run, out = ran
    assert [row["method"] for row in facts["methods"]] == METHODS
    printed, written = run.stdout.splitlines(), (out / "table.md").read_text().splitlines()
    for cells in report.make_table(facts):
        assert f"| {' | '.join(cells)} |" in written
        assert any(line.split() == " ".join(cells).split() for line in printed)


def test_methods_train_as_many_parameters_as_they_should(facts):
    rows = {row["method"]: row for row in facts["methods"]}
    size, model = demo.QUICK, facts["pretraining"]["parameters"]
    w, layers = size.width, size.layers
    head = 2 * w + 2
    assert (
        rows["full"]["trainable"]
        == rows["full"]["total"]
        == model - facts["pretraining"]["vocabulary"] + head
    )
    houlsby = 2 * layers * (2 * w * 16 + 16 + w)
    assert rows["adapter, Houlsby"]["trainable"] == houlsby + head
    assert rows["adapter, Pfeiffer"]["trainable"] == houlsby // 2 + head
    lora = 8 * (layers * (4 * w + 2 * w + 5 * w + 3 * w) + 2 * w)
    assert rows["LoRA"]["trainable"] == rows["QLoRA"]["trainable"] == lora + head
    assert rows["DoRA"]["trainable"] == lora + head + layers * (3 * w + w + 4 * w + w) + w
    assert rows["full"]["peak_bytes"] > rows["adapter, Houlsby"]["peak_bytes"] > 0


def test_the_report_shows_the_metrics(ran, facts):
    page = (ran[1] / "report.html").read_text()
    cells = [
        tuple(re.findall(r"<td>(.*?)</td>", row)) for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]
    for row in report.make_table(facts):
        assert row in cells
    for chart in (ran[1] / "charts").iterdir():
        assert chart.read_text() in page
    for sentence in facts["switching"]["sentences"]:
        assert sentence["text"] in page and all(
            f">{sentence[task][0]}<" in page for task in ("sentiment", "topic")
        )


def test_the_report_needs_no_network(ran):
    page = (ran[1] / "report.html").read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|<script|<link|src=|@import|url\(", page)


def test_measurements_are_consistent(facts):
    names = {row["way"] for row in facts["attention"]}
    assert names == {"LSH", "exact, fused", "exact, whole matrix"}
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in facts["attention"])
    assert all(
        row["same_gradients"] and row["reversible_bytes"] < row["stored_bytes"]
        for row in facts["depth"]
    )
    assert facts["four_bits"]["bytes"] < 0.15 * facts["four_bits"]["dense_bytes"]
    losses = [loss for _, loss in facts["pretraining"]["curve"]]
    assert len(losses) == demo.QUICK.steps and facts["pretraining"]["held_out_loss"] < losses[0]


# --- what it writes ---


def test_peft_loads_the_adapters(ran, facts):
    out = ran[1]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    words = tokenizer(
        [s["text"] for s in facts["switching"]["sentences"]], padding=True, return_tensors="pt"
    )
    for name in ("sentiment", "topic"):
        base = AutoModelForSequenceClassification.from_pretrained(out / "model")
        model = PeftModel.from_pretrained(base, out / name).eval()
        with torch.no_grad():
            probabilities, labels = model(**words).logits.softmax(-1).max(-1)
        for i, sentence in enumerate(facts["switching"]["sentences"]):
            label, probability = sentence[name]
            assert base.config.id2label[labels[i].item()] == label
            assert probabilities[i].item() == pytest.approx(probability, abs=1e-5)
    assert facts["switching"]["mixed_agrees"]


def test_predict_uses_the_adapters(ran, facts, capsys):
    sentence = facts["switching"]["sentences"][0]
    for name in ("sentiment", "topic"):
        assert (
            main(["predict", "--device", "cpu", "--adapter", str(ran[1] / name), sentence["text"]])
            == 0
        )
        assert capsys.readouterr().out.split("\t")[0] == sentence[name][0]


# --- errors ---


@pytest.mark.parametrize("case", ["a file", "other files", "under a file"])
def test_an_output_that_cannot_be_written_is_one_line(case, tmp_path, capsys):
    out = tmp_path / "out"
    if case == "other files":
        out.mkdir()
        (out / "thesis.tex").write_text("text")
    else:
        out.write_text("text")
        out = out / "below" if case == "under a file" else out
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", "--quick", "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("pyfast demo: --out ") and line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_transformers_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "pip install transformers" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, code", [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)]
)
def test_a_stop_leaves_the_earlier_output(error, code, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "table.md").write_text("earlier")

    def stop(size, folder, out):
        (folder / "model").mkdir()
        raise error

    monkeypatch.setattr(demo, "_train", stop)
    assert main(["demo", "--quick", "--out", str(out)]) == code
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (
        out / "table.md"
    ).read_text() == "earlier"


def test_an_earlier_demo_is_replaced(tmp_path):
    out = tmp_path / "out"
    for text in ("first", "second"):
        with output.replace_directory(out) as folder:
            (folder / "table.md").write_text(text)
        assert (out / "table.md").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- parts ---


def test_prose_has_no_code():
    text = "Raised when an operation runs out of memory but the situation may still be rescued.\n\n    x = f(a, b)[0] + {1: 2}\n\nShort."
    assert list(texts._split_prose(text)) == [text.partition("\n")[0]]
    paragraphs = texts.read_prose(200)
    assert len(set(paragraphs)) == 200
    assert all(len(paragraph.split()) >= 6 for paragraph in paragraphs)


def test_only_exact_shares_are_0_and_100_percent():
    assert report.percent(0) == "0.0 %" and report.percent(1) == "100.0 %"
    assert report.percent(0.0004) == "<0.1 %" and report.percent(0.9996) == ">99.9 %"
    assert report.percent(0.996, digits=0) == ">99 %" and report.percent(0.994, digits=0) == "99 %"


def test_axes_have_round_ticks_around_the_values():
    assert [text for _, text in charts.linear_axis("", [0.13, 0.71], 0).ticks] == [
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
    ]
    assert [text for _, text in charts.log_axis("", [1024, 4096], 2).ticks] == ["1K", "2K", "4K"]
    assert [text for _, text in charts.log_axis("", [3.0, 2500.0], 10).ticks] == [
        "1",
        "10",
        "100",
        "1,000",
        "10,000",
    ]
    axis = charts.log_axis("", [1.0, 100.0], 10)
    assert [axis.place(value) for value in (1, 10, 100)] == pytest.approx([0, 0.5, 1])


def test_a_chart_is_xml_with_a_point_for_each_value():
    y = charts.linear_axis("<loss> & more", [0, 1])
    text = charts.draw_lines(
        [charts.Line("a", [(0, 0), (1, 1)])], charts.linear_axis("step", [0, 1]), y
    )
    (line,) = ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}polyline")
    (x0, y0), (x1, y1) = (
        [float(v) for v in point.split(",")] for point in line.get("points").split()
    )
    assert x0 == charts.LEFT and y1 == charts.TOP and x1 > x0 and y1 < y0


def test_names_of_lines_do_not_touch():
    text = "".join(charts._write_names([(0, 100, "a", ""), (0, 102, "b", ""), (0, 40, "c", "")]))
    places = sorted(float(y) for y in re.findall(r' y="([\d.]+)"', text))
    assert min(b - a for a, b in itertools.pairwise(places)) >= 14


def test_the_page_escapes_what_it_shows(facts):
    changed = facts | {"machine": facts["machine"] | {"device": "<b>&"}}
    assert "&lt;b&gt;&amp;" in demo_page.write_html(
        changed, "out"
    ) and "<b>&" not in demo_page.write_html(changed, "out")


def test_peak_memory_is_the_largest_at_a_time(device):
    def call():
        for _ in range(3):
            a = torch.empty(1 << 20, device=device)
            del a
        return torch.empty(1 << 18, device=device)

    assert 4 << 20 <= measure.peak_bytes(call, device) < 5 << 20


def test_held_bytes_counts_shared_memory_once():
    model = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(2)])
    assert measure.held_bytes(model) == 2 * 256
    model[1].weight = model[0].weight
    assert measure.held_bytes(model) == 256
