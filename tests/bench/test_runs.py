"""Runs of whole benches: what they write, and what an interrupted one leaves."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import __main__ as bench

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m", "bench"]


def run_bench(*words):
    return subprocess.run([*PYTHON, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def all_ops(tmp_path_factory):
    """Run every op, tiny, in one call, without peers whose import takes seconds."""
    out = tmp_path_factory.mktemp("bench")
    names = "pyfast,pyfast-plain,torch,frozen,sdpa"
    size = ["--shapes", "64x64", "--m", "2", "--dtype", "bf16", "--peers", names, "--budget", "5"]
    done = run_bench("--quick", *size, "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.mark.parametrize("op", bench.OPS)
def test_an_op_is_measured_and_written(op, all_ops):
    out, printed = all_ops
    record = json.loads((out / f"{op}.json").read_text())
    assert record["bench"] == op and "--m 2" in record["flags"] and "stopped" not in record
    assert {"cpu", "torch", "commit", "date"} <= record["machine"].keys() and record["ceilings"][
        "copy"
    ] > 1e8
    pyfast = [row for row in record["rows"] if row["impl"] == "pyfast"]
    assert pyfast and "WRONG" not in printed
    for row in pyfast:
        assert (
            0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
            and row["calls"] >= row["rounds"] > 0
        ), row
        assert (
            row["max_error"] <= row["error_limit"] and row["moved_bytes"] > 0 and row["percent"] > 0
        ), row
        assert row["peak_mb"] >= row["held_mb"] >= 0 and row["times_pyfast"] == 1, row
    lines = list(csv.DictReader((out / f"{op}.csv").read_text().splitlines()))
    assert [line["ms_p50"] for line in lines] == [
        str(row["ms_p50"] or "") for row in record["rows"]
    ]
    assert (out / f"{op}.png").read_bytes().startswith(b"\x89PNG") and f"{op}.json" in printed


def test_accuracy_and_drift_are_measured_beside_the_times(all_ops):
    out, _ = all_ops
    accuracy, drift = (
        json.loads((out / f"{name}.json").read_text())["rows"]
        for name in ("lsh_attention-accuracy", "reversible-drift")
    )
    assert len(accuracy) == 5 and all(line["ms fwd+bwd"] > 0 for line in accuracy)
    assert [line["impl"] for line in drift] == ["pyfast"] and drift[0]["gradients"] == 0


def test_peers_are_measured_beside_pyfast(all_ops):
    """Each peer has a ratio with a spread around it."""
    rows = [
        row
        for op in bench.OPS
        for row in json.loads((all_ops[0] / f"{op}.json").read_text())["rows"]
    ]
    others = [row for row in rows if row["impl"] in ("torch", "frozen", "sdpa")]
    assert {row["impl"] for row in others} == {"torch", "frozen", "sdpa"}
    assert all(0 < row["ratio_p20"] <= row["times_pyfast"] <= row["ratio_p80"] for row in others)


TINY = {
    "duplication": ["--length", "32", "--width", "16", "--batch", "2", "--budget", "1"],
    "learning": ["--length", "64", "--width", "24", "--batch", "2", "--steps", "3"],
    "long_attention": ["--tokens", "256"],
}


@pytest.mark.parametrize("name", TINY)
def test_what_is_no_op_runs_too(name, tmp_path):
    assert (
        bench.main([name, "--quick", *TINY[name], "--device", "cpu", "--out", str(tmp_path)]) == 0
    )
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (
        record["bench"] == name
        and (record.get("rows") or record["checked"])
        and "--quick" in record["flags"]
    )


def test_a_run_is_compared_with_an_older_one(all_ops, tmp_path, capsys):
    """The older run is a folder of results that say that it was a hundred times as fast."""
    out, _ = all_ops
    old = json.loads((out / "adapter.json").read_text())
    for row in old["rows"]:
        if row["impl"] == "pyfast":
            row |= {key: row[key] / 100 for key in ("ms_p20", "ms_p50", "ms_p80")}
    (tmp_path / "adapter.json").write_text(json.dumps(old))
    size = [
        "--shapes",
        "64x64",
        "--m",
        "2",
        "--peers",
        "pyfast,torch",
        "--budget",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert (
        bench.main(["adapter", "--quick", *size, "--device", "cpu", "--compare", str(tmp_path)])
        == 0
    )
    assert "slower" in capsys.readouterr().out
    assert "nothing to compare" in bench.compare_with_older({"adapter": old}, out / "nf4.json")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_what_is_finished(number, tmp_path):
    sizes = ",".join(map(str, range(1, 200)))
    words = ["nf4", "--shapes", "64x64", "--m", sizes, "--peers", "pyfast,torch", "--budget", "300"]
    command = [*PYTHON, *words, "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    path, end = tmp_path / "nf4.json", time.monotonic() + 300
    while not path.exists() or len(json.loads(path.read_text())["rows"]) < 8:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    printed, progress = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped" in progress, progress
    record = json.loads(path.read_text())
    assert record["stopped"].startswith("after ") and record["stopped"].endswith("of 599 cases")
    assert len(record["rows"]) >= 8 and all(
        row["ms_p50"] for row in record["rows"] if row["impl"] == "pyfast"
    )
    assert (
        "linear 64x64, bf16" in printed
        and record["stopped"] in printed
        and (tmp_path / "nf4.png").exists()
    )
    assert not list(tmp_path.glob(".*"))


def test_the_goals_of_a_folder_are_listed(all_ops, tmp_path, capsys):
    assert bench.main(["goals", str(all_ops[0])]) == 0
    assert (
        f"{len(bench.OPS)} goals: {len(bench.OPS)} met" in capsys.readouterr().out
    )  # of the errors alone
    goal = {
        "text": "linear: {:.2f}x as fast",
        "sense": ">=",
        "target": 4,
        "value": 3.0,
        "met": False,
        "why": "",
    }
    (tmp_path / "some.json").write_text(json.dumps({"goals": [goal]}))
    assert bench.main(["goals", str(tmp_path)]) == 0
    assert "MISSED" in capsys.readouterr().out
