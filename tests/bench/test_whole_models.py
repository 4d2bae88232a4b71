"""Benches of whole models, at toy sizes: all methods learn the same, and the files say so."""

import csv
import json
import math
import statistics
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import pyfast
from bench import __main__
from bench.llama import methods, run, step
from bench.llama import shapes as llama
from bench.measure import harness, own_process, spread
from bench.reformer import long_context

MODEL = ["--shape", "toy", "--layers", "1", "--seq", "24", "--steps", "2"]


@pytest.fixture
def in_process(monkeypatch):
    """Run steps without processes of their own, which take long to start."""
    monkeypatch.setattr(
        own_process, "run", lambda module, setup, *rest: import_module(module).main(setup)
    )


def bench(out, *words, status=0):
    assert __main__.main([*words, "--device", "cpu", "--out", str(out)]) == status


def record(out, name):
    """Return the result of the bench of that name, whose file's name may have an ending."""
    (path,) = (p for p in out.glob(f"{name}*.json"))
    rows = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
    result = json.loads(path.read_text())
    assert len(rows) == len(result["rows"])
    return result


def assert_measured(row):
    assert all(math.isfinite(s) and s > 0 for s in row["seconds"]) and row["tokens_per_s"] > 0
    assert 0 < row["built_bytes"] <= row["peak_bytes"] and row["trained"] > 0
    assert 0 <= row["loss_error"] <= row["loss_limit"] and not row["note"]
    assert (
        row["losses"] == pytest.approx(sorted(row["losses"], reverse=True))
        and len(set(row["losses"])) > 1
    )


def test_qlora_is_measured_beside_peft(tmp_path, in_process, capsys):
    bench(tmp_path, "qlora_7b", *MODEL, "--peers", "pyfast-nf4,peft-bnb")
    result = record(tmp_path, "qlora_7b")
    pyfast_row, peer_row = result["rows"]
    assert (pyfast_row["way"], peer_row["way"]) == ("pyfast-nf4", "peft-bnb") and pyfast_row[
        "checkpointing"
    ]
    for row in (pyfast_row, peer_row):
        assert_measured(row)
    assert (
        pyfast_row["trained"] == peer_row["trained"] == 16 * (4 * 64 * 2 - 2 * 32 + 3 * (64 + 128))
    )
    assert pyfast_row["losses"] == pytest.approx(peer_row["losses"], abs=pyfast_row["loss_limit"])
    (goal,) = result["goals"]
    assert goal["value"] == pytest.approx(
        pyfast_row["tokens_per_s"] / peer_row["tokens_per_s"]
    ) and goal["text"] in str(goal)
    printed = capsys.readouterr().out
    assert "peft-bnb" in printed and "goals" in printed
    assert "--layers 1" in result["flags"] and pyfast_row["rounds"] == [1] == peer_row["rounds"]
    assert peer_row["times_pyfast"] == goal["value"] and pyfast_row["times_pyfast"] == 1


def test_ratios_of_training_steps_are_those_of_the_same_round(tmp_path, in_process, capsys):
    words = ["training_step", *MODEL, "--steps", "3", "--rounds", "3", "--peers", "pyfast,peft"]
    bench(tmp_path, *words)
    result = record(tmp_path, "training_step")
    pyfast_row, peer_row = result["rows"]
    assert peer_row["rounds"] == [1, 1, 2, 2, 3, 3] and result["setup"]["rounds"] == 3
    halves = [
        statistics.median(row["seconds"][n : n + 2])
        for row in (peer_row, pyfast_row)
        for n in (0, 2, 4)
    ]
    low, middle, high = sorted(a / b for a, b in zip(halves[:3], halves[3:]))
    assert (
        peer_row["ratio_p20"],
        peer_row["times_pyfast"],
        peer_row["ratio_p80"],
    ) == pytest.approx((low, middle, high))
    goal = result["goals"][0]
    assert (goal["low"], goal["value"], goal["high"]) == pytest.approx((low, middle, high))
    assert f"{middle:.2f} ({low:.2f} to {high:.2f})" in capsys.readouterr().out


def test_a_training_step_beside_an_older_one(tmp_path, in_process, capsys):
    words = ["training_step", *MODEL, "--steps", "4", "--rounds", "1", "--peers", "pyfast"]
    bench(tmp_path, *words)
    result = record(tmp_path, "training_step")
    result["rows"][0]["seconds"] = [s / 100 for s in result["rows"][0]["seconds"]]
    (tmp_path / "training_step.json").write_text(json.dumps(result))
    capsys.readouterr()
    bench(tmp_path, *words, "--compare", str(tmp_path))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("of 1 rows of pyfast in both, 1 slower, 0 faster")


def run_of(method, rounds):
    """Return the run of a method with these seconds by round."""
    one = run.Run(method, "toy", 1, 1, 24, False)
    for turn, seconds in rounds.items():
        one.add(
            {
                "note": "",
                "seconds": seconds,
                "losses": [],
                "trained": 1,
                "built_bytes": 1,
                "peak_bytes": 1,
            },
            turn,
        )
    return one


def ratio(one, base):
    return spread.ratio(one.by_round(), base.by_round(), run.MIN_SHARED_ROUNDS)


def test_a_slow_round_of_the_machine_is_in_no_ratio():
    pyfast_run = run_of("pyfast", {1: [1.0, 1.0], 2: [5.0, 5.0], 3: [1.0, 1.0], 4: [2.0]})
    peer_row = run_of("peft", {1: [3.0, 3.0], 2: [15.0, 15.0], 3: [3.0, 3.0]})
    assert ratio(peer_row, pyfast_run) == (3, 3, 3)


def test_few_rounds_have_the_spread_of_both_methods():
    pyfast_run, peer_row = run_of("pyfast", {1: [1.0, 2.0]}), run_of("peft", {1: [3.0, 5.0]})
    assert ratio(peer_row, pyfast_run) == pytest.approx((4 / 1.5, 3 / 2, 5 / 1))
    assert ratio(peer_row, run_of("pyfast", {1: [2.0]})) == (2, None, None)


def test_training_steps_of_all_methods_are_measured(tmp_path, in_process):
    bench(
        tmp_path,
        "training_step",
        *MODEL,
        "--rounds",
        "1",
        "--peers",
        "full,peft,pyfast,unsloth,peft-bnb+patch",
    )
    rows = {row["way"]: row for row in record(tmp_path, "training_step")["rows"]}
    unsloth = rows.pop("unsloth")
    assert unsloth["note"] == "needs a GPU" and not unsloth["seconds"]
    for row in rows.values():
        assert_measured(row)
    assert rows["pyfast"]["trained"] == rows["peft"]["trained"] < rows["full"]["trained"]
    assert rows["pyfast"]["losses"] == pytest.approx(
        rows["peft"]["losses"], abs=rows["peft"]["loss_limit"]
    )


# --- the methods ---

STEPS = {
    "device": "cpu",
    "shape": "toy",
    "layers": 1,
    "batch": 1,
    "seq": 24,
    "steps": 4,
    "checkpointing": False,
}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_judge_is_lora_as_peft_has_it(base, monkeypatch):
    class PEFTFloat32(methods.PEFT):
        dtype = torch.float32

        def linear(self, weight):
            return judge.linear(weight)

    judge = methods.FLOAT32_METHODS[f"float32 {base} lora"]
    pyfast_row, peer_row = (step.train(way, STEPS) for way in (judge, PEFTFloat32()))
    assert (
        pyfast_row["losses"] == pytest.approx(peer_row["losses"], rel=1e-6)
        and pyfast_row["trained"] == peer_row["trained"]
    )


def test_without_peft_the_rest_is_checked(tmp_path, in_process, monkeypatch):
    def load(module):
        if module == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return import_module(module)

    monkeypatch.setattr(methods, "load_module", load)
    bench(
        tmp_path, "training_step", *MODEL, "--rounds", "1", "--peers", "full,pyfast,pyfast-nf4,peft"
    )
    *pyfast_rows, peer_row = record(tmp_path, "training_step")["rows"]
    for row in pyfast_rows:
        assert_measured(row)
    assert peer_row["note"] == "No module named 'peft'" and not peer_row["seconds"]


def test_unsloth_starts_from_the_same_numbers(monkeypatch):
    class Library:
        """Models by transformers and PEFT, as unsloth's are."""

        def from_pretrained(self, folder, dtype, load_in_4bit):
            return import_module("transformers").LlamaForCausalLM.from_pretrained(
                folder, dtype=dtype
            ), None

        def get_peft_model(self, model, r, use_gradient_checkpointing, **options):
            peft = import_module("peft")
            return peft.get_peft_model(model, peft.LoraConfig(r=r, **options))

    monkeypatch.setattr(
        methods, "load_module", lambda module: SimpleNamespace(FastLanguageModel=Library())
    )
    unsloth = step.train(methods.PEERS["unsloth"], STEPS)["losses"]
    monkeypatch.undo()
    assert unsloth == step.train(methods.PEERS["peft"], STEPS)["losses"]


def test_patched_models_are_measured_beside_peft(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "LONG_CALL", 60.0)  # no call is one, on a busy machine
    bench(tmp_path, "hf_patch", "--shapes", "64x1", "--m", "24", "--dtype", "bf16", "--budget", "1")
    result = record(tmp_path, "hf_patch")
    timed = [row for row in result["rows"] if row["m"]]
    assert {row["impl"] for row in timed} == {"pyfast", "peft"}
    assert len(timed) == 2 * 3 * 2 * 2 == 2 * (len(result["goals"]) - 1)  # one is of the errors
    for row in timed:
        assert row["ms_p50"] > 0 and row["peak_mb"] > row["held_mb"] > 0 and row["saved_mb"] > 0
        assert 0 < row["max_error"] <= row["error_limit"] and not row["note"], row


# --- long contexts ---

SMALL = ["--width", "16", "--heads", "1", "--head-dim", "16", "--hidden", "16"]


def test_both_models_are_measured_over_long_contexts(tmp_path):
    bench(tmp_path, "long_context", *SMALL, "--tokens", "4K", "--depth", "6")
    result = record(tmp_path, "long_context")
    shapes = [(model, 4096, 6) for model in ("Reformer", "Transformer")]
    assert [(row["model"], row["tokens"], row["depth"]) for row in result["rows"]] == shapes
    for row in result["rows"]:
        assert row["seconds"] == statistics.median(row["samples"]) > 0 and not row["note"]
        assert (
            row["peak_bytes"] > 4096 * 16 * 4
            and row["before_bytes"] > 0
            and math.isfinite(row["loss"])
        )


def test_a_million_tokens_are_the_reformers_alone(tmp_path, monkeypatch, capsys):
    sizes = {6: 10 * 10**9, 12: 15 * 10**9}

    def measured(module, setup, device, limit, seconds):
        assert seconds is None and setup["tokens"] == 1 << 20
        return {
            "seconds": 9.0,
            "samples": [9.0],
            "peak_bytes": sizes[setup["depth"]],
            "before_bytes": 10**9,
        }

    monkeypatch.setattr(own_process, "run", measured)
    bench(tmp_path, "long_context", "--tokens", "1M")
    result = record(tmp_path, "long_context-1048576")
    assert [(row["model"], row["depth"]) for row in result["rows"]] == [
        ("Reformer", 6),
        ("Reformer", 12),
    ]
    assert [(goal["value"], goal["met"]) for goal in result["goals"]] == [
        (11, True),
        (16, True),
        (1.5, False),
    ]
    assert result["flags"].startswith("--tokens 1M")
    capsys.readouterr()
    bench(tmp_path, "long_context", "--tokens", "1M", "--compare", str(tmp_path))
    printed = capsys.readouterr().out
    assert (
        "training step 12 layers float32 M=1048576 width 256" in printed
        and "of 2 rows of pyfast in both" in printed
    )


def test_what_is_larger_than_what_was_too_much_is_not_run(tmp_path, monkeypatch):
    def measured(module, setup, device, limit, seconds):
        assert seconds == long_context.GIVE_UP_FACTOR * 60
        if setup["model"] == "Transformer" and (setup["tokens"], setup["depth"]) == (1 << 14, 6):
            return {"note": "out of memory"}
        slow = setup["model"] == "Reformer" and setup["depth"] == 12
        return {"seconds": 61 if slow else 1, "samples": [1], "peak_bytes": 100, "before_bytes": 1}

    monkeypatch.setattr(own_process, "run", measured)
    bench(tmp_path, "long_context")
    notes = {
        (r["model"], r["tokens"], r["depth"]): r["note"]
        for r in record(tmp_path, "long_context")["rows"]
    }
    told = {shape: note for shape, note in notes.items() if note}
    assert told.pop(("Reformer", 1 << 14, 24)) == "over 60 s"
    assert set(told) == {
        ("Transformer", n, d) for m, n, d in notes if m == "Transformer" and n > 1 << 12 and d >= 6
    }
    assert set(told.values()) == {"out of memory"}


# --- processes of their own ---


def test_layers_of_pyfast_share_their_inputs():
    for method in (methods.PyFast(), methods.PyFast4Bit()):
        model = method.model(llama.make_config("toy", 1), "cpu", checkpointing=False)
        assert "(q_proj, k_proj, v_proj)" in str(pyfast.summary(model))


def test_a_model_is_the_same_for_every_type_of_layer():
    settings = llama.make_config("toy", 1)
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
    setup = {"method": "pyfast", "device": "cpu", "shape": "1b", "layers": 1, "checkpointing": True}
    result = own_process.run(
        "bench.llama.step", setup | {"batch": 1, "seq": 8, "steps": 1}, "cpu", 0.6
    )
    assert result == {"note": "out of memory (0.6 GB)"}


def test_what_goes_wrong_is_a_note(capfd):
    result = own_process.run("bench.llama.step", {"method": "pyfast", "device": "cpu"}, "cpu", 8)
    assert result == {"note": "KeyError: 'shape'"} and "Traceback" in capfd.readouterr().err
    assert own_process.run("bench.llama.step", {}, "cpu", 8, seconds=0.05) == {
        "note": "over 0.05 s"
    }


def test_a_wrong_method_is_not_timed(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(step, "TOLERANCE", 1e-9)
    bench(tmp_path, "qlora_7b", *MODEL, "--peers", "pyfast-nf4", status=1)
    result = record(tmp_path, "qlora_7b")
    (row,) = result["rows"]
    assert (
        row["note"].startswith("WRONG")
        and not row["seconds"]
        and row["loss_error"] > row["loss_limit"]
    )
    assert [goal["value"] for goal in result["goals"]] == [None] * len(result["goals"])
