"""Training steps of one Llama by one method, in a process of its own: times, losses, memory.

A step is forward, backward, AdamW and emptied gradients, on the same tokens every time. Where the
losses of a smaller model are known, they are checked first. `bench.measure.own_process` runs it.
"""

import gc
import sys
import time
import warnings
from typing import Any

import torch

from bench.llama import shapes
from bench.llama.methods import FLOAT32_METHODS, PEERS, TrainingMethod
from bench.measure import own_process
from bench.measure.peer import silence

TOLERANCE = 0.01  # of how far a loss falls; of the loss itself a tenth of that


def main(setup: dict) -> dict:
    """Check the losses if they are known, then train; return the fields of the result."""
    method, checked = (PEERS | FLOAT32_METHODS)[setup["method"]], {}
    if setup.get("expected_losses"):
        checked = check(method, setup | setup["check"], setup["expected_losses"])
        gc.collect()
        if checked["note"]:
            return checked
    return checked | train(method, setup)


def check(method: TrainingMethod, setup: dict, expected: list[float]) -> dict[str, Any]:
    """Train a small model and compare its losses with the expected ones."""
    if not method.has_adapters:
        # Weights in bfloat16 that AdamW writes to soon differ, so that only the first loss counts.
        expected = expected[:1]
    losses = train(method, setup)["losses"]
    limit = TOLERANCE * (expected[0] - min(expected) + expected[0] / 10)
    error = max(abs(a - b) for a, b in zip(losses, expected))
    note = "" if error <= limit else f"WRONG: a loss is off by {error:.1e}, limit {limit:.1e}"
    return {"loss_error": error, "loss_limit": limit, "note": note}


def train(method: TrainingMethod, setup: dict) -> dict[str, Any]:
    """Build the model and train it for some steps; return times, losses and memory."""
    config, device = shapes.make_config(setup["shape"], setup["layers"]), setup["device"]
    begin = time.perf_counter()
    with silence():
        model = method.model(config, device, setup["checkpointing"]).train()
    ids = shapes.draw_tokens(config.vocab_size, setup["batch"], setup["seq"], device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, method.rate)
    built, losses, seconds = own_process.held_bytes(device), [], []
    elapsed = time.perf_counter() - begin
    report(f"{setup['layers']} layers built in {elapsed:.0f} s: {built / 1e9:.2f} GB")

    def step() -> float:
        loss = method.loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(setup["steps"]):
            begin = time.perf_counter()
            losses.append(step())
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            report(f"step {number + 1} of {setup['steps']}: {seconds[-1]:.2f} s")
    messages = [str(warning.message) for warning in caught]
    # pyfast warns where it is slower than it could be.
    notes = [message for message in messages if message.startswith("pyfast:")]
    return {
        "seconds": seconds[1:] or seconds,
        "losses": losses,
        "trained": sum(p.numel() for p in trained),
        "built_bytes": built,
        "peak_bytes": own_process.peak_bytes(device),
        "note": notes[0] if notes else "",
    }


def report(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
