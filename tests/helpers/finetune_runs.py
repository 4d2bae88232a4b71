"""Runs of the command `finetune` with small models, and what they wrote."""

import json

import torch
from helpers.tiny_checkpoints import records, write_jsonl, write_model
from safetensors.torch import load_file

from pyfast.cli.main import main

SELECT = {"bert": "encoder.layer.1.*", "llama": "layers.1.*", "gpt2": "h.1.*"}


def write_files(root):
    """Write a model of each architecture and data, and return the folder."""
    for architecture in SELECT:
        write_model(root / architecture, architecture)
    write_model(root / "dropout", "bert", dropout=0.2)
    write_jsonl(root / "train.jsonl", records(40))
    write_jsonl(root / "test.jsonl", records(16, seed=1))
    (root / "lines.txt").write_text("\n".join(record["text"] for record in records(60)))
    return root


def arguments(files, out, architecture="bert", task="classify", method="lora", **changes):
    """Return the words of a command; a change to None leaves a flag out, True gives it no value."""
    options = {"model": files / architecture, "out": out, "task": task, "method": method}
    options |= {"batch": 8, "steps": 6, "lr": 3e-3}
    if task == "classify":
        options |= {"data": files / "train.jsonl", "eval": files / "test.jsonl"}
    else:
        options |= {"data": files / "lines.txt", "max_length": 16}
    if method == "select":
        options["select"] = SELECT.get(architecture)
    words = ["finetune"]
    for name, value in (options | changes).items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
        if value is not None and value is not True:
            words.append(str(value))
    return words


def run(*words):
    """Run a command and return its exit code."""
    return main([str(word) for word in words])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in metrics(out)]


def weights(out):
    """Return all tensors in the output's files, by file and name."""
    tensors = {}
    for path in out.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            tensors[path.name, name] = tensor
    assert tensors
    return tensors


def assert_same_weights(out, other, exact=True):
    tensors, others = weights(out), weights(other)
    assert tensors.keys() == others.keys()
    limits = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], **limits)
