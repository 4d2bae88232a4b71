"""One training step of one model at one length: its time and its memory.

`bench.measure.own_process` runs it in a process of its own.
"""

import statistics
import time

import torch

import pyfast
from bench.measure.own_process import peak_bytes
from bench.reformer.models import MODELS, count_parameters, load_text

LONG_STEP = 5.0  # seconds, from which one step is enough


def main(setup: dict) -> dict:
    """Measure steps of the model that the setup describes; return the result's fields."""
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
    ids = load_text()
    ids = ids.repeat(-(-setup["tokens"] // len(ids)))[: setup["tokens"]][None].to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_bytes(device)
    losses, seconds = [], []
    min_steps = 2 if device == "cuda" else 1  # on a GPU the first compiles kernels
    while len(seconds) < min_steps or (seconds[min_steps - 1] < LONG_STEP and len(seconds) < 4):
        begin = time.perf_counter()
        loss = model(ids, labels=ids)
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        del loss
    samples = seconds[1:] or seconds
    return {
        "seconds": statistics.median(samples),
        "samples": samples,
        "peak_bytes": peak_bytes(device) - before,
        "before_bytes": before,
        "loss": losses[0],
        "parameters": count_parameters(model),
    }
