"""Training steps of one Llama, trained in one way, in a process of its own: times, losses, memory.

A step is forward, backward, AdamW and emptied gradients, on the same tokens every time. `bench.own_process` runs it.
"""

import sys
import time
import warnings

import torch

from bench import llama, own_process
from bench.llama_ways import JUDGES, PEERS
from bench.peers import quiet

RATE = 1e-3


def main(setup: dict) -> dict:
    way, device = (PEERS | JUDGES)[setup["way"]], setup["device"]
    settings = llama.config(setup["shape"], setup["layers"])
    begun = time.perf_counter()
    with quiet():
        model = way.model(settings, device, setup["checkpointing"]).train()
    ids = llama.tokens(settings.vocab_size, setup["batch"], setup["seq"], device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE)
    built, losses, seconds = own_process.held(device), [], []
    print(f"  built in {time.perf_counter() - begun:.0f} s: {built / 1e9:.2f} GB", file=sys.stderr, flush=True)

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
            print(f"  step {number + 1} of {setup['steps']}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    found = {"seconds": seconds[1:] or seconds, "losses": losses, "trained": sum(p.numel() for p in trained)}
    note = next((str(w.message) for w in heard if str(w.message).startswith("pyfast:")), "")  # it is slower than it may
    return found | {"built_bytes": built, "peak_bytes": own_process.peak(device), "note": note}
