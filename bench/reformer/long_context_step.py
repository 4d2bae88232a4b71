"""One training step of one model at one length, in a process of its own: its time and its memory.

`bench.measure.own_process` runs it.
"""

import statistics
import time

import torch

import pyfast
from bench.measure.own_process import peak
from bench.reformer.models import MODELS, size, text

LONG = 5.0  # seconds, from which one step is enough


def main(setup: dict) -> dict:
    config = pyfast.ReformerConfig(
        256,
        setup["width"],
        ("local", "lsh") * (setup["depth"] // 2),
        setup["heads"],
        head_dim=setup["head_dim"],
        hidden=setup["hidden"],
        max_length=setup["tokens"],
        n_hashes=setup["n_hashes"],
        exact=setup["exact"],
    )
    device, dtype = setup["device"], getattr(torch, setup["dtype"])
    torch.manual_seed(0)
    model = MODELS[setup["model"]](config).to(device, dtype)
    ids = text()
    ids = ids.repeat(-(-setup["tokens"] // len(ids)))[: setup["tokens"]][None].to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak(device)
    losses, seconds = [], []
    least = 2 if device == "cuda" else 1  # the first compiles kernels
    while len(seconds) < least or (seconds[least - 1] < LONG and len(seconds) < 4):
        begun = time.perf_counter()
        loss = model(ids, labels=ids)
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        del loss
    samples = seconds[1:] or seconds
    found = {"seconds": statistics.median(samples), "samples": samples}
    found |= {"peak_bytes": peak(device) - before, "before_bytes": before}
    return found | {"loss": losses[0], "parameters": size(model)}
