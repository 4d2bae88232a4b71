"""Tests that a wrong input of `finetune` gives one line, and leaves nothing behind."""

import errno
import json
import os
import sys

import pytest
import torch
from helpers.finetune_runs import arguments, assert_same_weights, losses, run, write_files
from helpers.tiny_checkpoints import records, tokenizer, write_jsonl, write_model

from pyfast.finetune import data, methods, output_files
from pyfast.formats import safetensors_file
from pyfast.hf import load_quantized


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def refused(files, tmp_path, capsys):
    """Return a function that runs a command that must fail, and returns its line on stderr."""

    def refuse(*words, code=2, **changes):
        command = words or arguments(files, **{"out": tmp_path / "out", **changes})
        capsys.readouterr()  # drops what earlier commands of the test printed
        assert run(*command) == code
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and not printed.out
        assert printed.err.startswith("pyfast finetune: ")
        assert words or "out" in changes or not (tmp_path / "out").exists()
        return printed.err

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


def lacking(*names):
    def make(path):
        write_model(path, "bert")
        tensors = safetensors_file.read(path / "model.safetensors")
        safetensors_file.write(
            path / "model.safetensors",
            {n: t for n, t in tensors.items() if not n.startswith(names)},
        )

    make.__name__ = f"no {names[0]}"
    return make


def own_code(path):
    write_model(path, "bert")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"model_type": "custom", "auto_map": {"AutoConfig": "custom.C"}})
    )
    (path / "custom.py").write_text("raise SystemExit('it ran')")


def larger_tokenizer(path):
    write_model(path, "bert", vocab_size=8)


MODELS = {
    no_model: "is not a directory; it must be a transformers checkpoint",
    lambda path: None: "has no config.json",
    no_weights: "has no weights; it must have model.safetensors",
    cut_weights: "cannot be loaded: ",
    no_tokenizer: "cannot be loaded: ",
    broken_config: "cannot be loaded: ",
    lacking(
        "bert.encoder.layer.1."
    ): "has no bert.encoder.layer.1.attention.output.LayerNorm.bias of the model's shape",
    lacking(
        "bert.embeddings.word"
    ): "has no bert.embeddings.word_embeddings.weight of the model's shape",
    own_code: "cannot be loaded: ",
    larger_tokenizer: "",
    pickled: "has pickled weights only, which can run code when read; --allow-pickle reads them",
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_wrong_model_is_refused(refused, tmp_path, make):
    path = tmp_path / "model"
    path.mkdir()
    make(path)
    line = refused(model=path)
    expected = (
        f"--model {path} {MODELS[make]}"
        if MODELS[make]
        else ", and the model 8 embeddings; they do not fit"
    )
    assert expected in line


def test_pickles_are_read_if_that_is_allowed(files, tmp_path, refused):
    path = tmp_path / "model"
    write_model(path, "bert")
    torch.save(safetensors_file.read(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert run(*arguments(files, tmp_path / "out", model=path, allow_pickle=True)) == 0


def test_missing_transformers_is_reported(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed; pip install transformers" in refused()


def test_a_model_that_sees_later_tokens_is_no_language_model(refused, files):
    line = refused(architecture="bert", task="lm")
    assert (
        "bert is a BertLMHeadModel that sees the tokens after each, too; --task lm needs one that"
        in line
    )


def test_4_bits_do_not_train_in_full(files, tmp_path, refused):
    load_quantized(files / "llama").save_pretrained(tmp_path / "model")
    tokenizer(pads=False).save_pretrained(tmp_path / "model")
    assert "model is in 4 bits, which do not train in full" in refused(
        model=tmp_path / "model", method="full"
    )


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
    GOOD + '{"text": {"en": "' + "a" * 99 + '"}}': "line 2: text is {'en': 'aaaaaaa",
    GOOD
    + '{"text": "a \\ud83d", "label": "x"}': "line 2: text holds half of a surrogate pair; it must be Unicode",
    GOOD
    + '{"text": "a", "label": "x", "split": "dev"}': "line 2: split is 'dev'; it must be 'train' or 'test'",
    GOOD: "the only label is 'positive'; to classify there must be two or more",
}


@pytest.mark.parametrize("text", DATA)
def test_a_wrong_record_is_refused(refused, tmp_path, text):
    (tmp_path / "data.jsonl").write_text(text)
    assert DATA[text] in refused(data=tmp_path / "data.jsonl")


def test_a_wrong_data_file_is_refused(refused, tmp_path):
    assert "nothing.jsonl cannot be read: No such file or directory" in refused(
        data=tmp_path / "nothing.jsonl"
    )
    assert "data.txt ends in '.txt'; data for classify must be .jsonl or .csv" in refused(
        data=tmp_path / "data.txt"
    )
    (tmp_path / "data.csv").write_bytes(b"text,label\n\xff\xfe,a\n")
    assert "data.csv is not UTF-8" in refused(data=tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("words,label\na,b\n")
    assert "data.csv, line 2: text is missing" in refused(data=tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("text,label\ngood, warm soup,positive\n")
    assert (
        'line 2 has more fields than the header\'s 2; a text with commas must be in "quotes"'
        in refused(data=tmp_path / "data.csv")
    )
    (tmp_path / "data.csv").write_text('text,label\n"good soup,positive\nsad soup,negative\n')
    assert "is not CSV: unexpected end of data" in refused(data=tmp_path / "data.csv")
    rows = [{**record, "split": "test"} for record in records(4)]
    assert "split 'test' only" in refused(data=write_jsonl(tmp_path / "test.jsonl", rows))
    (tmp_path / "one.txt").write_text("soup")
    options = {"architecture": "bert", "task": "lm", "data": tmp_path / "one.txt"}
    assert "one.txt has 1 tokens; it must have 2 or more" in refused(**options)


def test_a_label_that_is_not_in_the_training_data_is_refused(refused, tmp_path):
    data = write_jsonl(tmp_path / "eval.jsonl", [{"text": "a soup", "label": "neutral"}])
    line = refused(eval=data)
    assert (
        "eval.jsonl, line 1: label is 'neutral'; the training data has negative, positive" in line
    )


def test_files_of_windows_and_spreadsheets_are_read(tmp_path):
    """They have a byte order mark, CRLF, empty lines and fields, quotes, and a very long text."""
    rows = [f'"{r["text"]}\r\n""so"", it says",{r["label"]},' for r in records(12)]
    rows[3] = f'"{"good " * 40000}",positive,'
    text = "\r\n".join(["text,label,split", *rows[:5], "", *rows[5:], ""])
    (tmp_path / "data.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "data.jsonl").write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode()
    )
    (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbfthe soup\r\nis good\r\n")
    loaded = data.read_records(tmp_path / "data.csv", "classify")
    labels = [record["label"] for record in records(12)]
    labels[3] = "positive"
    assert [record.label for record in loaded] == labels
    assert loaded[0].text.endswith('\r\n"so", it says') and loaded[0].split is None
    assert len(loaded[3].text) == 200000
    assert len(data.read_records(tmp_path / "data.jsonl", "classify")) == 2
    assert data.read_records(tmp_path / "data.txt", "lm")[0].text == "the soup\nis good\n"


# --- output ---


def test_an_output_that_cannot_be_written_is_refused(refused, tmp_path, files):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("text")
    line = refused(out=tmp_path / "full")
    assert "full is there already, and not an empty directory; choose another, or --resume" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    assert "is not a writable directory" in refused(out=tmp_path / "full/file/out")
    assert "full is there already" in refused(out=tmp_path / "full", find_lr=True)


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_leaves_the_last_checkpoint(files, tmp_path, capsys, monkeypatch, at):
    """The first write of tensors fails, or the third; with room on the disk, training continues."""
    calls, write = [], safetensors_file.write

    def limited(path, tensors):
        calls.append(path)
        write(path, tensors) if len(calls) < at else (path.write_bytes(b"half"), full_disk())

    words = arguments(files, tmp_path / "out", save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "write", limited)
        assert run(*words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "pyfast finetune: No space left on device"
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kept = {"state.json", "step-4.safetensors"} if at == 3 else set()
    assert names == {"finetune.json", "metrics.jsonl"} | kept
    assert run("finetune", "--resume", tmp_path / "out") == 0
    assert run(*arguments(files, tmp_path / "other")) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "other")
    assert_same_weights(tmp_path / "out", tmp_path / "other")


# --- methods, settings, resuming ---


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"targets": "nothing"},
            "targets ['nothing'] match no layer; the model's linear layers are called",
        ),
        (
            {"method": "select", "select": "encoder.layer.9.*"},
            "which match no parameter; the nearest names are",
        ),
        (
            {"method": "select", "select": None},
            "--select is empty; the method select needs patterns",
        ),
        (
            {"method": "full", "targets": "query"},
            "--targets is ['query'], and the method is full; it must be lora or dora or qlora or adapter",
        ),
        ({"targets": "classifier"}, "targets ['classifier'] match no layer"),
        ({"select": "a"}, "--select is ['a'], and the method is lora; it must be select"),
        ({"shard": True}, "shard is set, and there is one process; start several with torchrun"),
        ({"eval": None, "patience": 2}, "patience is 2, and there is nothing to evaluate"),
        (
            {"method": "full", "rank": 4},
            "--rank is 4, and the method is full; it must be lora or dora or qlora",
        ),
        (
            {"method": "full", "share_inputs": True},
            "--share-inputs is True, and the method is full; it must be lora or dora or qlora",
        ),
        ({"bottleneck": 4}, "--bottleneck is 4, and the method is lora; it must be adapter"),
        ({"device": "gpu"}, "--device gpu cannot be used: "),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used: "),
        ({"batch": 0}, "--batch is 0; it must be an integer, 1 or more"),
        ({"max_length": 1}, "--max-length is 1; it must be 2 or more"),
        ({"rank": 0}, "r is 0; it must be an integer, 1 or more"),
        (
            {"model": None, "task": None},
            "--model, --task missing; a new training needs --model, --data, --out",
        ),
        (
            {"resume": "somewhere"},
            "--resume has its settings from somewhere; leave out --model, --data",
        ),
    ],
)
def test_a_wrong_option_is_refused(refused, changes, message):
    assert message in refused(**changes)


@pytest.mark.parametrize(
    "words", [["--task", "translate"], ["--color"], ["--rank", "many"], ["--select"]]
)
def test_unknown_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run("finetune", *words)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert line.startswith("pyfast") and words[0] in line


def test_out_of_memory_is_reported(refused, monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(methods, "apply", exhausted)
    assert "out of memory; a smaller --batch or --max-length takes less" in refused()


def test_a_missing_or_damaged_training_is_not_resumed(files, refused, tmp_path, capsys):
    assert "finetune.json cannot be read: No such file" in refused("finetune", "--resume", tmp_path)
    out = tmp_path / "out"
    assert run(*arguments(files, out)) == 0
    state, settings = out / "checkpoint/state.json", out / "finetune.json"
    capsys.readouterr()
    fields = json.loads(state.read_text())
    for text, message in (
        ("{", "state.json is not JSON"),
        ("{}", "state.json is incomplete; it must have step"),
        (
            json.dumps(fields | {"tensors": "step-9.safetensors"}),
            "step-9.safetensors cannot be read",
        ),
    ):
        state.write_text(text)
        assert message in refused("finetune", "--resume", out)
    state.write_text(json.dumps(fields))
    assert "leave out --epochs, --seed" in refused(
        "finetune", "--resume", out, "--seed", 1, "--epochs", 9, "--lr", 1
    )
    records_text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(records_text.replace("{", "", 1))
    assert "metrics.jsonl is damaged: " in refused("finetune", "--resume", out)
    job = json.loads(settings.read_text())
    settings.write_text(json.dumps({**job, "job": {**job["job"], "color": "red"}}))
    assert "finetune.json is not of this version" in refused("finetune", "--resume", out)


def test_predict_refuses_a_missing_or_damaged_training(files, tmp_path, capsys):
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
    assert run("predict", "--adapter", tmp_path / "out", "--device", "gpu", "soup") == 2
    assert "pyfast predict: --device gpu cannot be used: " in capsys.readouterr().err


def test_predict_refuses_a_text_that_is_too_long_to_continue(files, tmp_path, capsys):
    assert run(*arguments(files, tmp_path / "out", "gpt2", "lm", steps=1)) == 0
    for tokens, message in (
        (62, "a text of 3 tokens and --tokens 62 are over the model's 64"),
        (0, "--tokens is 0"),
    ):
        capsys.readouterr()
        assert (
            run("predict", "--adapter", tmp_path / "out", "--tokens", tokens, "the good soup") == 2
        )
        assert capsys.readouterr().err.startswith(f"pyfast predict: {message}")
    assert run("predict", "--adapter", tmp_path / "out", "--tokens", 61, "the good soup") == 0


def test_missing_matplotlib_is_reported(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*arguments(files, tmp_path / "out")) == 0
    assert (
        "no plot: matplotlib is not installed (pip install matplotlib)" in capsys.readouterr().err
    )
    assert not (tmp_path / "out/loss.png").exists()


def test_an_interrupt_is_reported(files, tmp_path, capsys, monkeypatch):
    def interrupt(metrics, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(output_files.Metrics, "add", interrupt)
    assert run(*arguments(files, tmp_path / "out")) == 130
    assert "pyfast finetune: stopped; finetune --resume DIR continues" in capsys.readouterr().err
