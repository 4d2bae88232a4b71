"""A measurement in a process of its own, so that its memory is capped and its peak is its own.

`run("bench.llama.step", {...}, "cpu", 20)` returns what `main({...})` of that module returns there,
or {"note": the reason why there is no result}. On a CPU the kernel enforces the cap, on a GPU
torch's allocator does.
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

import torch

from bench.measure.peer import describe_error

ROOT = pathlib.Path(__file__).parents[2]


def run(
    module: str, setup: dict, device: str, limit: float, seconds: float | None = None
) -> dict[str, Any]:
    """Run `module.main(setup)` within `limit` GB and, if given, so many seconds.

    What it prints on stderr is passed on.
    """
    arguments = {"module": module, "setup": setup, "device": device, "limit": int(limit * 1e9)}
    command = [sys.executable, "-m", "bench.measure.own_process", json.dumps(arguments)]
    # Without this glibc keeps freed tensors' memory, in pieces.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=seconds, env=env
        )
    except subprocess.TimeoutExpired:
        return {"note": f"over {seconds:g} s"}
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        cause = f": out of memory ({limit:g} GB)?" if name == "SIGKILL" else ""
        return {"note": f"killed by {name}{cause}"}
    if done.returncode:
        return {"note": f"its process ended with exit code {done.returncode}"}
    result = json.loads(done.stdout.splitlines()[-1])
    if result.get("note") == "out of memory":
        result["note"] += f" ({limit:g} GB)"
    return result


def peak_bytes(device: str) -> int:
    """Return the most memory this process has held: on a CPU all of it, on a GPU its tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _read_status("VmHWM")  # not getrusage, which inherits its parent's peak


def held_bytes(device: str) -> int:
    """Return the memory that this process holds now, counted as in `peak_bytes`."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return _read_status("VmRSS")


def _read_status(key: str) -> int:
    """Return the bytes of an entry of /proc/self/status, which has them in KB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024


def _cap_memory(device: str, limit: int) -> None:
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _main(module: str, setup: dict, device: str, limit: int) -> dict[str, Any]:
    _cap_memory(device, limit)
    try:
        return importlib.import_module(module).main(setup)
    except Exception as error:
        message = str(error).lower()
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and ("memory" in message or "bad_alloc" in message)
        ):
            return {"note": "out of memory"}
        traceback.print_exc()
        return {"note": describe_error(error)}


if __name__ == "__main__":
    # An installed pyfast is found before the bare sources beside this folder.
    sys.path.append(sys.path.pop(0))
    print(json.dumps(_main(**json.loads(sys.argv[1]))))
