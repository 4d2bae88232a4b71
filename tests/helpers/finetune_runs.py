"""Fine-tunings by command, of small models, and what they wrote."""

import json

import torch
from helpers.tiny_checkpoints import records, write_jsonl, write_model
from safetensors.torch import load_file

from pyfast.cli.main import main

SELECT = {"bert": "encoder.layer.1.*", "llama": "layers.1.*", "gpt2": "h.1.*"}


def write_files(root):
    """Models by kind, and data."""
    for kind in SELECT:
        write_model(root / kind, kind)
    write_model(root / "dropout", "bert", dropout=0.2)
    write_jsonl(root / "train.jsonl", records(40))
    write_jsonl(root / "test.jsonl", records(16, seed=1))
    (root / "lines.txt").write_text("\n".join(record["text"] for record in records(60)))
    return root


def arguments(files, out, kind="bert", task="classify", method="lora", **changes):
    """A command's; a change to None leaves one out, to True has no value."""
    given = {
        "model": files / kind,
        "out": out,
        "task": task,
        "method": method,
        "batch": 8,
        "steps": 6,
        "lr": 3e-3,
    }
    given |= {"data": files / ("train.jsonl" if task == "classify" else "lines.txt")}
    given |= {"eval": files / "test.jsonl"} if task == "classify" else {"max_length": 16}
    given |= {"select": SELECT.get(kind)} if method == "select" else {}
    words = []
    for name, value in (given | changes).items():
        flag = f"--{name.replace('_', '-')}"
        words += [] if value is None else [flag] if value is True else [flag, str(value)]
    return ["finetune", *words]


def run(*words):
    return main([str(word) for word in words])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in metrics(out)]


def weights(out):
    found = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert found
    return {
        (file, name): tensor for file, tensors in found.items() for name, tensor in tensors.items()
    }


def assert_same(out, other, exact=True):
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        limits = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(tensor, theirs[name], **limits)
