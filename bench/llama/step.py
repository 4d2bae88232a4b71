"""Training steps of one Llama, trained in one way, in a process of its own: times, losses, memory.

A step is forward, backward, AdamW and emptied gradients, on the same tokens every time. Where the
losses of a smaller one are known, they are checked first. `bench.measure.own_process` runs it.
"""

import gc
import sys
import time
import warnings
from typing import Any

import torch

from bench.llama import shapes
from bench.llama.ways import JUDGES, PEERS, Way
from bench.measure import own_process
from bench.measure.peer import quiet

TOLERANCE = 0.01  # of how far a loss falls, and a tenth of it of the loss


def main(setup: dict) -> dict:
    way, checked = (PEERS | JUDGES)[setup["way"]], {}
    if setup.get("right"):
        checked = check(way, setup | setup["check"], setup["right"])
        gc.collect()
        if checked["note"]:
            return checked
    return checked | train(way, setup)


def check(way: Way, setup: dict, right: list[float]) -> dict[str, Any]:
    if not way.adapted:  # weights in bfloat16 that AdamW writes to are soon other ones
        right = right[:1]
    found = train(way, setup)["losses"]
    limit = TOLERANCE * (right[0] - min(right) + right[0] / 10)
    error = max(abs(a - b) for a, b in zip(found, right))
    note = "" if error <= limit else f"WRONG: a loss is off by {error:.1e}, limit {limit:.1e}"
    return {"loss_error": error, "loss_limit": limit, "note": note}


def train(way: Way, setup: dict) -> dict[str, Any]:
    config, device = shapes.config(setup["shape"], setup["layers"]), setup["device"]
    begun = time.perf_counter()
    with quiet():
        model = way.model(config, device, setup["checkpointing"]).train()
    ids = shapes.tokens(config.vocab_size, setup["batch"], setup["seq"], device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, way.rate)
    built, losses, seconds = own_process.held(device), [], []
    say(
        f"{setup['layers']} layers built in {time.perf_counter() - begun:.0f} s: {built / 1e9:.2f} GB"
    )

    def step() -> float:
        loss = way.loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for number in range(setup["steps"]):
            begun = time.perf_counter()
            losses.append(step())
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            say(f"step {number + 1} of {setup['steps']}: {seconds[-1]:.2f} s")
    found = {
        "seconds": seconds[1:] or seconds,
        "losses": losses,
        "trained": sum(p.numel() for p in trained),
    }
    note = next(
        (str(w.message) for w in heard if str(w.message).startswith("pyfast:")), ""
    )  # it is slower than it may
    return found | {"built_bytes": built, "peak_bytes": own_process.peak(device), "note": note}


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
