"""The benches of whole models, at toy sizes: every way learns the same, and the files say so."""

import csv
import json
import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from bench import __main__, harness, llama, llama_step, llama_ways, own_process

MODEL = ["--shape", "toy", "--layers", "1", "--seq", "24", "--steps", "2"]


@pytest.fixture
def in_process(monkeypatch):
    """Steps without their own processes, which take long to start."""
    monkeypatch.setattr(own_process, "run", lambda module, setup, *rest: import_module(module).main(setup))


def bench(out, *words):
    assert __main__.main([*words, "--device", "cpu", "--out", str(out)]) == 0


def record(out, name):
    """Of the bench of that name, whatever else is in the file's."""
    (path,) = (p for p in out.glob(f"{name}*.json"))
    rows = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
    found = json.loads(path.read_text())
    assert len(rows) == len(found["rows"])
    return found


def assert_measured(row):
    assert all(math.isfinite(s) and s > 0 for s in row["seconds"]) and row["tokens_per_s"] > 0
    assert 0 < row["built_bytes"] <= row["peak_bytes"] and row["trained"] > 0
    assert 0 <= row["loss_error"] <= row["loss_limit"] and not row["note"]
    assert row["losses"] == pytest.approx(sorted(row["losses"], reverse=True)) and len(set(row["losses"])) > 1


def test_qlora(tmp_path, in_process, capsys):
    bench(tmp_path, "qlora_7b", *MODEL, "--peers", "pyfast-nf4,peft-bnb")
    found = record(tmp_path, "qlora_7b")
    ours, theirs = found["rows"]
    assert (ours["way"], theirs["way"]) == ("pyfast-nf4", "peft-bnb") and ours["checkpointing"]
    for row in (ours, theirs):
        assert_measured(row)
    assert ours["trained"] == theirs["trained"] == 16 * (4 * 64 * 2 - 2 * 32 + 3 * (64 + 128))
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=ours["loss_limit"])
    (goal,) = found["goals"]
    assert goal["value"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"]) and goal["text"] in str(goal)
    printed = capsys.readouterr().out
    assert "peft-bnb" in printed and "goals" in printed


def test_training_step(tmp_path, in_process):
    bench(tmp_path, "training_step", *MODEL, "--rounds", "1", "--peers", "full,peft,pyfast,unsloth,peft-bnb+patch")
    rows = {row["way"]: row for row in record(tmp_path, "training_step")["rows"]}
    unsloth = rows.pop("unsloth")
    assert unsloth["note"] == "needs a GPU" and not unsloth["seconds"]
    for row in rows.values():
        assert_measured(row)
    assert rows["pyfast"]["trained"] == rows["peft"]["trained"] < rows["full"]["trained"]
    assert rows["pyfast"]["losses"] == pytest.approx(rows["peft"]["losses"], abs=rows["peft"]["loss_limit"])


# --- the ways ---

STEPS = {"device": "cpu", "shape": "toy", "layers": 1, "batch": 1, "seq": 24, "steps": 4, "checkpointing": False}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_judge_is_lora_as_peft_has_it(base, monkeypatch):
    class PEFTFloat32(llama_ways.PEFT):
        dtype = torch.float32

        def linear(self, weight):
            return judge.linear(weight)

    judge = llama_ways.JUDGES[f"float32 {base} lora"]
    ours, theirs = (llama_step.train(way, STEPS) for way in (judge, PEFTFloat32()))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6) and ours["trained"] == theirs["trained"]


def test_without_peft_the_rest_is_checked(tmp_path, in_process, monkeypatch):
    def load(module):
        if module == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return import_module(module)

    monkeypatch.setattr(llama_ways, "load", load)
    bench(tmp_path, "training_step", *MODEL, "--rounds", "1", "--peers", "full,pyfast,pyfast-nf4,peft")
    *ours, theirs = record(tmp_path, "training_step")["rows"]
    for row in ours:
        assert_measured(row)
    assert theirs["note"] == "No module named 'peft'" and not theirs["seconds"]


def test_unsloth_starts_from_the_same_numbers(monkeypatch):
    class Library:
        """Models by transformers and PEFT, as unsloth's are."""

        def from_pretrained(self, folder, dtype, load_in_4bit):
            return import_module("transformers").LlamaForCausalLM.from_pretrained(folder, dtype=dtype), None

        def get_peft_model(self, model, r, use_gradient_checkpointing, **options):
            peft = import_module("peft")
            return peft.get_peft_model(model, peft.LoraConfig(r=r, **options))

    monkeypatch.setattr(llama_ways, "load", lambda module: SimpleNamespace(FastLanguageModel=Library()))
    unsloth = llama_step.train(llama_ways.PEERS["unsloth"], STEPS)["losses"]
    monkeypatch.undo()
    assert unsloth == llama_step.train(llama_ways.PEERS["peft"], STEPS)["losses"]


def test_hf_patch(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "LONG", 60.0)  # no call is one, on a busy machine
    bench(tmp_path, "hf_patch", "--shapes", "64x1", "--m", "24", "--dtype", "bf16", "--budget", "1")
    found = record(tmp_path, "hf_patch")
    timed = [row for row in found["rows"] if row["m"]]
    assert {row["impl"] for row in timed} == {"pyfast", "peft"}
    assert len(timed) == 2 * 3 * 2 * 2 == 2 * len(found["goals"])
    for row in timed:
        assert row["ms_p50"] > 0 and row["peak_mb"] > row["held_mb"] > 0 and row["saved_mb"] > 0
        assert 0 < row["max_error"] <= row["error_limit"] and not row["note"], row


# --- the process of its own ---


def test_a_model_is_the_same_for_every_kind_of_layer():
    settings = llama.config("toy", 1)
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = []

        def linear(weight, weights=weights):
            weights.append(weight)
            return torch.nn.Linear(1, 1)

        model = llama.build(settings, linear, dtype, "cpu")
        seen.append([*weights, model.lm_head.weight.bfloat16()])
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert model.lm_head.weight.dtype == dtype
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b) and abs(a.float().norm(dim=1).mean() - 1) < 0.1


def test_too_much_memory_is_a_note():
    setup = {"way": "pyfast", "device": "cpu", "shape": "1b", "layers": 1, "checkpointing": True}
    found = own_process.run("bench.llama_step", setup | {"batch": 1, "seq": 8, "steps": 1}, "cpu", 0.6)
    assert found == {"note": "out of memory (0.6 GB)"}


def test_what_goes_wrong_is_a_note(capfd):
    found = own_process.run("bench.llama_step", {"way": "pyfast", "device": "cpu"}, "cpu", 8)
    assert found == {"note": "KeyError: 'shape'"} and "Traceback" in capfd.readouterr().err
    assert own_process.run("bench.llama_step", {}, "cpu", 8, seconds=0.05) == {"note": "over 0.05 s"}


def test_a_wrong_way_is_not_timed(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(llama_step, "TOLERANCE", 1e-9)
    bench(tmp_path, "qlora_7b", *MODEL, "--peers", "pyfast-nf4")
    found = record(tmp_path, "qlora_7b")
    (row,) = found["rows"]
    assert row["note"].startswith("WRONG") and not row["seconds"] and row["loss_error"] > row["loss_limit"]
    assert [goal["value"] for goal in found["goals"]] == [None] * len(found["goals"])
