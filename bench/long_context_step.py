"""One training step of one model at one length, in a process of its own: its time and its memory, as JSON.

`python -m bench.long_context_step '{"model": "Reformer", "tokens": 4096, ...}'`. The memory it may have is capped: on a
CPU by the kernel, on a GPU in the allocator.
"""

import json
import pathlib
import resource
import sys
import time

import torch

import pyfast
from bench.reformer_problem import MODELS, size, text

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
    before = cap(device, setup["limit"])
    losses, seconds = [], []
    while not seconds or (seconds[0] < LONG and len(seconds) < 4):
        begun = time.perf_counter()
        loss = model(ids, labels=ids)
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        del loss
    seconds = sorted(seconds[1:] or seconds)
    found = {"seconds": seconds[len(seconds) // 2], "peak_bytes": peak(device) - before, "before_bytes": before}
    return found | {"loss": losses[0], "parameters": size(model)}


def cap(device: str, limit: int) -> int:
    """What is held so far; together with all that comes it must stay below the limit."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return peak(device)


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = pathlib.Path("/proc/self/status").read_text()  # not getrusage, which inherits a parent's peak
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and "bad_alloc" not in str(error):
            raise
        print(json.dumps({"note": "out of memory"}))
