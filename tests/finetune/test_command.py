"""Tests of the commands `finetune` and `predict`, from files to files."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.finetune_runs import (
    SELECT,
    arguments,
    assert_same_weights,
    losses,
    metrics,
    run,
    weights,
    write_files,
)
from helpers.tiny_checkpoints import records, tokenizer, write_jsonl
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import pyfast
from pyfast.finetune import methods, output_files, pretrained

ROOT = Path(__file__).parents[2]
TEXTS = ["the soup was good", "it is a very awful train", "a lovely book"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def run_python(*words):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


# --- results ---


@pytest.mark.parametrize("architecture", SELECT)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_classifies_and_predict_agrees(files, tmp_path, capsys, architecture, method):
    out = tmp_path / "out"
    assert run(*arguments(files, out, architecture, method=method, precision="bf16", steps=12)) == 0
    assert f"written: {out}; evaluation: loss" in capsys.readouterr().out
    log = metrics(out)
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_second", "memory"}
    assert [record["step"] for record in log] == list(range(1, 13))
    assert all(keys <= record.keys() for record in log)
    assert {"eval_loss", "eval_accuracy"} <= log[-1].keys()
    assert (out / "loss.png").stat().st_size > 1000
    assert json.loads((out / "finetune.json").read_text())["labels"]
    test = [json.loads(line) for line in (files / "test.jsonl").read_text().splitlines()]
    assert run("predict", "--adapter", out, *(record["text"] for record in test)) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    correct = sum(label == record["label"] for (label, _, _), record in zip(rows, test))
    assert [text for _, _, text in rows] == [record["text"] for record in test]
    # predict pads no text, which may change the label of one.
    accuracy = log[-1]["eval_accuracy"]
    assert correct / len(test) == pytest.approx(accuracy, abs=1.1 / len(test))


def test_targets_say_where_adapters_are(files, tmp_path, capsys):
    options = {"method": "adapter", "targets": "intermediate.dense", "steps": 2}
    assert run(*arguments(files, tmp_path / "out", **options)) == 0
    names = [name for _, name in weights(tmp_path / "out") if ".adapter_" in name]
    assert {name.split(".adapter_")[0] for name in names} == {
        f"base_model.model.bert.encoder.layer.{i}.intermediate.dense" for i in range(2)
    }
    assert run("predict", "--adapter", tmp_path / "out", *TEXTS) == 0


def test_layers_share_their_inputs_if_that_is_asked_for(files, tmp_path, monkeypatch):
    configs, original = [], methods.add_lora
    monkeypatch.setattr(
        methods, "add_lora", lambda model, config: configs.append(config) or original(model, config)
    )
    assert run(*arguments(files, tmp_path / "out", steps=2)) == 0
    assert run(*arguments(files, tmp_path / "shared", steps=2, share_inputs=True)) == 0
    assert [config.share_inputs for config in configs] == [False, True]
    assert run("finetune", "--resume", tmp_path / "shared") == 0
    path = tmp_path / "out" / "finetune.json"  # as older versions wrote it
    settings = json.loads(path.read_text())
    del settings["job"]["options"]["share_inputs"]
    path.write_text(json.dumps(settings))
    assert run("finetune", "--resume", tmp_path / "out") == 0
    assert [config.share_inputs for config in configs[2:]] == [True, False]


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_a_language_model(files, tmp_path, capsys, method):
    out = tmp_path / "out"
    assert run(*arguments(files, out, "llama", "lm", method, steps=30, lr=1e-2)) == 0
    assert losses(out)[-1] < losses(out)[0] - 0.08
    capsys.readouterr()
    assert run("predict", "--adapter", out, "--tokens", 5, "the soup") == 0
    assert 3 <= len(capsys.readouterr().out.split()) <= 7


@pytest.mark.parametrize("architecture", SELECT)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_reads_the_adapter(files, tmp_path, capsys, architecture, method):
    out = tmp_path / "out"
    assert run(*arguments(files, out, architecture, method=method, steps=10)) == 0
    base = AutoModelForSequenceClassification.from_pretrained(files / architecture, num_labels=2)
    model = PeftModel.from_pretrained(base, out).eval()
    tokenizer = AutoTokenizer.from_pretrained(files / architecture)
    capsys.readouterr()
    assert run("predict", "--adapter", out, *TEXTS) == 0
    for line, text in zip(capsys.readouterr().out.splitlines(), TEXTS):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        probabilities = model(input_ids=ids).logits[0].softmax(-1)
        label = ["negative", "positive"][probabilities.argmax()]
        assert line.split("\t")[:2] == [label, f"{probabilities.max():.3f}"]


@pytest.mark.parametrize(
    "task, auto", [("classify", AutoModelForSequenceClassification), ("lm", AutoModelForCausalLM)]
)
def test_full_writes_a_transformers_checkpoint(files, tmp_path, task, auto):
    out = tmp_path / "out"
    assert run(*arguments(files, out, "llama", task, "full")) == 0
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out)
    assert task == "lm" or model.config.id2label == {0: "negative", 1: "positive"}


def test_predict_takes_a_model_that_moved(files, tmp_path, capsys):
    (tmp_path / "old").symlink_to(files / "bert")
    assert run(*arguments(files, tmp_path / "out", model=tmp_path / "old")) == 0
    (tmp_path / "old").unlink()
    assert run("predict", "--adapter", tmp_path / "out", *TEXTS) == 2
    assert run("predict", "--adapter", tmp_path / "out", "--model", files / "bert", *TEXTS) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_job_works_from_another_directory(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    words = {"model": "bert", "data": "train.jsonl", "eval": "test.jsonl"}
    assert run(*arguments(files, tmp_path / "out", **words)) == 0
    monkeypatch.chdir(tmp_path)
    assert run("finetune", "--resume", "out") == 0
    assert run("predict", "--adapter", "out", *TEXTS) == 0


def test_qlora_reads_layers_in_4_bits_and_leaves_new_modules_dense(files):
    model, _, new_modules = pretrained.load(
        str(files / "bert"), ["a", "b"], False, torch.bfloat16, "qlora"
    )
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert new_modules == ["bert.pooler.dense", "classifier"] == dense
    assert model.config.id2label == {0: "a", 1: "b"}
    plain = AutoModelForSequenceClassification.from_pretrained(files / "bert", dtype=torch.bfloat16)
    for name, layer in pyfast.quantize(plain, skip=new_modules).named_modules():
        if isinstance(layer, pyfast.NF4Linear):
            assert torch.equal(layer.nf4_weight.packed, model.get_submodule(name).nf4_weight.packed)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_checkpoint_of_bitsandbytes_trains(files, tmp_path, method):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(files / "llama", quantization_config=config)
    model.save_pretrained(tmp_path / "model")
    tokenizer(pads=False).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = {"model": tmp_path / "model", "steps": 15, "lr": 3e-2}
    assert run(*arguments(files, out, "llama", "lm", method, **options)) == 0
    assert min(losses(out)[-3:]) < losses(out)[0] - 0.1
    assert run("predict", "--adapter", out, "--tokens", 5, "the soup") == 0


def test_roberta_takes_fewer_tokens_than_it_has_positions():
    config = RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    model = RobertaForSequenceClassification(config)
    length = pretrained.limit_length(model, SimpleNamespace(model_max_length=10**30), 256)
    assert length == 62
    model(input_ids=torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 5))


def test_a_terminal_shows_a_progress_bar(files, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("pyfast._support.progress._PAUSE", 0)
    for columns, longest in (("300", 299), ("40", 39)):
        monkeypatch.setenv("COLUMNS", columns)
        terminal.truncate(0)
        assert run(*arguments(files, tmp_path / columns, steps=3, eval_every=2)) == 0
        bars = [
            part.split("\n")[0]
            for part in terminal.getvalue().split("\r")
            if part.startswith("train [")
        ]
        assert len(bars) == 3 and all(len(bar) <= longest for bar in bars)
        assert columns == "40" or "evaluation" in bars[1]
        for bar, record in zip(bars if columns == "300" else [], metrics(tmp_path / columns)):
            assert f" {record['step']}/3 " in bar and f" loss {record['loss']:.3f}, " in bar
            assert f"{record['tokens_per_second']:.0f} tokens/s, {record['memory']:.0f} MB" in bar


@pytest.mark.parametrize(
    "labels, names", [([3, 10], ["3", "10"]), (["b", "a"], ["a", "b"]), ([2, "1"], ["1", "2"])]
)
def test_labels_become_names_in_order(files, tmp_path, labels, names):
    rows = [{"text": r["text"], "label": labels[r["label"] == "positive"]} for r in records(20)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert run(*arguments(files, tmp_path / "out", data=data, eval=None)) == 0
    assert json.loads((tmp_path / "out/finetune.json").read_text())["labels"] == names


def test_a_csv_file_holds_both_splits(files, tmp_path, capsys):
    rows = [
        f'"{r["text"]}",{r["label"]},{"test" if i % 4 == 0 else "train"}'
        for i, r in enumerate(records(40))
    ]
    (tmp_path / "data.csv").write_text("\n".join(["text,label,split", *rows]))
    out = tmp_path / "out"
    options = {"data": tmp_path / "data.csv", "eval": None, "steps": None, "epochs": 2}
    assert run(*arguments(files, out, batch=10, **options)) == 0
    assert [record["epoch"] for record in metrics(out)] == [0.3333, 0.6667, 1, 1.3333, 1.6667, 2]
    assert "accuracy" in capsys.readouterr().out and "eval_loss" in metrics(out)[2]


# --- stopping and resuming ---

KILLED = """
import os, sys
from pyfast.cli import main
from pyfast.finetune import trainer
at, where, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
module, name = {"step": (trainer.Trainer, "_apply_gradients"), "move": (os, "replace")}[where]
original, calls = getattr(module, name), []
def killed(*args):
    calls.append(args)
    if len(calls) == at:
        os.kill(os.getpid(), 9)
    return original(*args)
setattr(module, name, killed)
main.main(argv)
"""


@pytest.mark.parametrize("method, where, at", [("lora", "step", 8), ("full", "move", 6)])
def test_a_killed_training_resumes_to_the_bit(files, tmp_path, method, where, at):
    options = {"method": method, "save_every": 3, "steps": 10, "accumulation": 2, "eval_every": 4}
    assert run(*arguments(files, tmp_path / "uninterrupted", "dropout", **options)) == 0
    killed = run_python(
        "-c", KILLED, at, where, *arguments(files, tmp_path / "out", "dropout", **options)
    )
    assert killed.returncode == -9, killed.stderr
    if where == "step":
        assert not list((tmp_path / "out").glob("adapter*")) and len(losses(tmp_path / "out")) == 7
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a cut line
    assert run("finetune", "--resume", tmp_path / "out") == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "uninterrupted")
    assert_same_weights(tmp_path / "out", tmp_path / "uninterrupted")
    assert not list((tmp_path / "out").rglob(".*"))  # nothing half-written is left
    resumed, expected = metrics(tmp_path / "out"), metrics(tmp_path / "uninterrupted")
    assert [r.get("eval_loss") for r in resumed] == [r.get("eval_loss") for r in expected]


@pytest.mark.parametrize("at", range(1, 7))
def test_at_any_moment_a_good_checkpoint_is_there(tmp_path, monkeypatch, at):
    """The process is killed at its n-th operation on the disk, and cleans nothing up."""
    checkpoint, tensors = output_files.Checkpoint(tmp_path / "checkpoint"), {"a": torch.arange(5)}
    checkpoint.write(tensors, {"step": 1, "best": {}, "guard": None})

    class Killed(BaseException):
        """A kill, which no code catches."""

    calls = []

    def stopping(original):
        def stopped(*args, **kwargs):
            calls.append(original)
            if len(calls) >= at:
                raise Killed
            return original(*args, **kwargs)

        return stopped

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            patch.setattr(module, name, stopping(getattr(module, name)))
        with pytest.raises(Killed):
            checkpoint.write({"a": torch.arange(5) + 1}, {"step": 2, "best": {}, "guard": None})
    kept, fields = checkpoint.read()
    assert torch.equal(kept["a"], tensors["a"] + fields["step"] - 1)
    checkpoint.write({"a": torch.arange(5) + 2}, {"step": 3, "best": {}, "guard": None})
    names = {path.name for path in checkpoint.directory.iterdir()}
    assert names == {"state.json", "step-3.safetensors"}
    assert checkpoint.read()[1]["step"] == 3


def test_a_finished_training_resumes_to_the_same(files, tmp_path):
    options = {"steps": 12, "eval_every": 1, "patience": 1, "lr": 1e-2}
    assert run(*arguments(files, tmp_path / "out", **options)) == 0
    before, records_before = weights(tmp_path / "out"), metrics(tmp_path / "out")
    assert run("finetune", "--resume", tmp_path / "out") == 0
    for key, tensor in weights(tmp_path / "out").items():
        assert torch.equal(before[key], tensor)
    assert metrics(tmp_path / "out") == records_before


# --- the learning rate ---


def test_a_rate_that_is_too_high_stops_and_a_lower_one_continues(files, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"architecture": "llama", "method": "full", "lr": 2.0, "steps": 90}
    options |= {"warmup": 90, "save_every": 1}
    assert run(*arguments(files, out, **options)) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pyfast finetune: the learning rate 2 is too high: at step" in error
    assert "try 0.2" in error
    assert f"finetune --resume {out} --lr 0.2 continues from step" in error
    kept = json.loads((out / "checkpoint/state.json").read_text())["step"]
    assert 1 <= kept < metrics(out)[-1]["step"] and not (out / "config.json").exists()
    assert run("finetune", "--resume", out, "--lr", 2e-3) == 0
    assert metrics(out)[kept]["lr"] < 2e-3 and metrics(out)[-1]["step"] == 90
    assert json.loads((out / "finetune.json").read_text())["job"]["training"]["lr"] == 2e-3


def test_find_lr_proposes_a_rate_that_trains(files, tmp_path, capsys):
    assert run(*arguments(files, tmp_path / "find", "llama", find_lr=True)) == 0
    rate = float(capsys.readouterr().out.removeprefix("learning rate: "))
    names = {path.name for path in (tmp_path / "find").iterdir()}
    assert names == {"learning_rate.json", "learning_rate.png"}
    assert run(*arguments(files, tmp_path / "out", "llama", lr=rate, steps=40)) == 0
    assert sum(losses(tmp_path / "out")[-5:]) / 5 < losses(tmp_path / "out")[0] - 0.1
