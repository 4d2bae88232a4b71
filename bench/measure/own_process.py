"""A measurement in a process of its own: its memory is capped, and its peak is nobody else's.

`run("bench.llama.step", {...}, "cpu", 20)` is what `main({...})` of that module returns there, or
{"note": why there is nothing}. The cap is the kernel's on a CPU, the allocator's on a GPU.
"""

import importlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


def run(
    module: str, setup: dict, device: str, limit: float, seconds: float | None = None
) -> dict[str, Any]:
    """Within `limit` GB and, if given, so many seconds. What it prints on stderr is seen."""
    words = {"module": module, "setup": setup, "device": device, "limit": int(limit * 1e9)}
    command = [sys.executable, "-m", "bench.measure.own_process", json.dumps(words)]
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20)
    }  # or glibc keeps, in pieces, what tensors gave back
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=seconds, env=env
        )
    except subprocess.TimeoutExpired:
        return {"note": f"over {seconds:g} s"}
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {
            "note": f"killed by {name}"
            + (f": out of memory ({limit:g} GB)?" if name == "SIGKILL" else "")
        }
    if done.returncode:
        return {"note": f"its process ended with exit code {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    if found.get("note") == "out of memory":
        found["note"] += f" ({limit:g} GB)"
    return found


def peak(device: str) -> int:
    """The most this process has held so far: on a CPU all of it, on a GPU its tensors."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")  # not getrusage's, which inherits a parent's


def held(device: str) -> int:
    """What it holds now."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _status(key: str) -> int:
    return (
        int(pathlib.Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024
    )


def _cap(device: str, limit: int) -> None:
    if device == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(
            min(1.0, limit / torch.cuda.get_device_properties(0).total_memory)
        )
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _main(module: str, setup: dict, device: str, limit: int) -> dict[str, Any]:
    from bench.measure.peer import reason

    _cap(device, limit)
    try:
        return importlib.import_module(module).main(setup)
    except Exception as error:
        words = str(error).lower()
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and ("memory" in words or "bad_alloc" in words)
        ):
            return {"note": "out of memory"}
        traceback.print_exc()
        return {"note": reason(error)}


if __name__ == "__main__":
    sys.path.append(
        sys.path.pop(0)
    )  # an installed pyfast before the bare sources beside this folder
    print(json.dumps(_main(**json.loads(sys.argv[1]))))
