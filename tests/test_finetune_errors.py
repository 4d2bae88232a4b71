"""What is wrong with a fine-tuning is one line, and leaves nothing behind."""

import errno
import json
import os
import sys

import pytest
import torch
from finetune_runs import arguments, losses, run, weights, write_files
from tiny_checkpoints import records, write_jsonl, write_model

from pyfast import run_files, tensor_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def refused(files, tmp_path, capsys):
    """Runs a command that must be refused; the line that says why."""

    def refuse(*words, code=2, **changes):
        command = words or arguments(files, **{"out": tmp_path / "out", **changes})
        assert run(*command) == code
        found = capsys.readouterr()
        assert found.err.count("\n") == 1 and found.err.startswith("pyfast finetune: ") and not found.out
        assert words or "out" in changes or not (tmp_path / "out").exists()
        return found.err

    return refuse


# --- models ---


def no_model(path):
    path.rmdir()


def no_weights(path):
    write_model(path, "bert")
    (path / "model.safetensors").unlink()


def cut_weights(path):
    write_model(path, "bert")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:2000])


def no_tokenizer(path):
    write_model(path, "bert")
    (path / "tokenizer.json").unlink()


def broken_config(path):
    write_model(path, "bert")
    (path / "config.json").write_text('{"model_type": ')


def pickled(path):
    write_model(path, "bert")
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")


MODELS = {
    no_model: "is not a directory; it must be a transformers checkpoint",
    lambda path: None: "has no config.json",
    no_weights: "has no weights; it must have model.safetensors",
    cut_weights: "cannot be loaded: ",
    no_tokenizer: "cannot be loaded: ",
    broken_config: "cannot be loaded: ",
    pickled: "has pickled weights only, which can run code when read; --allow-pickle reads them",
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_models(refused, tmp_path, make):
    path = tmp_path / "model"
    path.mkdir()
    make(path)
    line = refused(model=path)
    assert f"--model {path} {MODELS[make]}" in line


def test_pickles_are_read_where_that_is_allowed(files, tmp_path, refused):
    path = tmp_path / "model"
    write_model(path, "bert")
    torch.save(tensor_file.read(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert run(*arguments(files, tmp_path / "out", model=path, allow_pickle=True)) == 0


def test_without_transformers(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed; pip install transformers" in refused()


# --- data ---

GOOD = '{"text": "good soup", "label": "positive"}\n'
DATA = {
    "": "holds no records",
    "\n\n": "holds no records",
    GOOD + "nonsense": "line 2 is not JSON: ",
    GOOD + "\n[1]": "line 3 is list; it must be an object",
    GOOD + '{"label": "x"}': "line 2: text is missing; it must be a string, not empty",
    GOOD + '{"text": " ", "label": "x"}': "line 2: text is ' '; it must be",
    GOOD + '{"text": "a"}': "line 2: label is missing; it must be a string or an integer",
    GOOD + '{"text": "a", "label": true}': "line 2: label is True; it must be",
    GOOD + '{"text": "a", "label": "x", "split": "dev"}': "line 2: split is 'dev'; it must be 'train' or 'test'",
    GOOD: "the only label is 'positive'; to classify there must be two or more",
}


@pytest.mark.parametrize("text", DATA)
def test_data(refused, tmp_path, text):
    (tmp_path / "data.jsonl").write_text(text)
    assert DATA[text] in refused(data=tmp_path / "data.jsonl")


def test_files_of_data(refused, tmp_path):
    assert "nothing.jsonl cannot be read: No such file or directory" in refused(data=tmp_path / "nothing.jsonl")
    assert "data.txt ends in '.txt'; data for classify must be .jsonl or .csv" in refused(data=tmp_path / "data.txt")
    (tmp_path / "data.csv").write_bytes(b"text,label\n\xff\xfe,a\n")
    assert "data.csv is not UTF-8" in refused(data=tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("words,label\na,b\n")
    assert "data.csv, line 2: text is missing" in refused(data=tmp_path / "data.csv")
    rows = [{**record, "split": "test"} for record in records(4)]
    assert "split 'test' only" in refused(data=write_jsonl(tmp_path / "test.jsonl", rows))
    (tmp_path / "one.txt").write_text("soup")
    options = {"kind": "bert", "task": "lm", "data": tmp_path / "one.txt"}
    assert "one.txt has 1 tokens; it must have 2 or more" in refused(**options)


def test_a_label_that_training_does_not_know(refused, tmp_path):
    data = write_jsonl(tmp_path / "eval.jsonl", [{"text": "a soup", "label": "neutral"}])
    line = refused(eval=data)
    assert "eval.jsonl, line 1: label is 'neutral'; the training data has negative, positive" in line


# --- output ---


def test_outputs_that_cannot_be(refused, tmp_path, files):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    line = refused(out=tmp_path / "full")
    assert "full is there already, and not an empty directory; choose another, or --resume" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert "is not a writable directory" in refused(out=tmp_path / "full/mine/out")
    assert "full is there already" in refused(out=tmp_path / "full", find_lr=True)


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_leaves_the_last_checkpoint(files, tmp_path, capsys, monkeypatch, at):
    """The first write of tensors fails, or the third; what is there goes on when there is room."""
    calls, write = [], tensor_file.write

    def limited(path, tensors):
        calls.append(path)
        write(path, tensors) if len(calls) < at else (path.write_bytes(b"half"), full_disk())

    words = arguments(files, tmp_path / "out", save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "write", limited)
        assert run(*words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "pyfast finetune: No space left on device"
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kept = {"state.json", "step-4.safetensors"} if at == 3 else set()
    assert names == {"finetune.json", "metrics.jsonl"} | kept
    assert run("finetune", "--resume", tmp_path / "out") == 0
    assert run(*arguments(files, tmp_path / "other")) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "other")
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "other")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- methods, settings, resuming ---


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"targets": "nothing"}, "targets ['nothing'] match no layer; the model's linear layers are called"),
        ({"method": "select", "select": "encoder.layer.9.*"}, "which match no parameter; the nearest names are"),
        ({"method": "select", "select": None}, "--select is empty; the method select needs patterns"),
        ({"method": "full", "targets": "query"}, "--targets is ['query'], and the method is full; it must be lora"),
        ({"select": "a"}, "--select is ['a'], and the method is lora; it must be select"),
        ({"shard": True}, "shard is set, and there is one process; start several with torchrun"),
        ({"eval": None, "patience": 2}, "patience is 2, and there is nothing to evaluate"),
        ({"batch": 0}, "--batch is 0; it must be an integer, 1 or more"),
        ({"max_length": 1}, "--max-length is 1; it must be 2 or more"),
        ({"rank": 0}, "r is 0; it must be an integer, 1 or more"),
        ({"model": None, "task": None}, "--model, --task missing; a new training needs --model, --data, --out"),
        ({"resume": "somewhere"}, "--resume has its settings from somewhere; leave out --model, --data"),
    ],
)
def test_what_does_not_fit(refused, changes, says):
    assert says in refused(**changes)


def test_resuming_what_is_not_there_or_damaged(files, refused, tmp_path, capsys):
    assert "finetune.json cannot be read: No such file" in refused("finetune", "--resume", tmp_path)
    out = tmp_path / "out"
    assert run(*arguments(files, out)) == 0
    state, settings = out / "checkpoint/state.json", out / "finetune.json"
    capsys.readouterr()
    fields = json.loads(state.read_text())
    for text, says in (
        ("{", "state.json is not JSON"),
        ("{}", "state.json is incomplete; it must have step"),
        (json.dumps(fields | {"tensors": "step-9.safetensors"}), "step-9.safetensors cannot be read"),
    ):
        state.write_text(text)
        assert says in refused("finetune", "--resume", out)
    job = json.loads(settings.read_text())
    settings.write_text(json.dumps({**job, "job": {**job["job"], "colour": "red"}}))
    assert "finetune.json is not of this version" in refused("finetune", "--resume", out)


def test_predictions_that_cannot_be(files, tmp_path, capsys):
    assert run("predict", "--adapter", tmp_path, "soup") == 2
    assert (
        capsys.readouterr().err
        == f"pyfast predict: {tmp_path}/finetune.json cannot be read: No such file or directory\n"
    )
    assert run(*arguments(files, tmp_path / "out")) == 0
    (tmp_path / "out/adapter_model.safetensors").write_bytes(b"12345678")
    capsys.readouterr()
    assert run("predict", "--adapter", tmp_path / "out", "soup") == 2
    assert "pyfast predict: " in capsys.readouterr().err


def test_without_matplotlib_it_says_so(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*arguments(files, tmp_path / "out")) == 0
    assert "no plot: matplotlib is not installed (pip install matplotlib)" in capsys.readouterr().err
    assert not (tmp_path / "out/loss.png").exists()


def test_stopped_by_hand(files, tmp_path, capsys, monkeypatch):
    def interrupt(metrics, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_files.Metrics, "add", interrupt)
    assert run(*arguments(files, tmp_path / "out")) == 130
    assert "pyfast finetune: stopped; finetune --resume goes on" in capsys.readouterr().err
