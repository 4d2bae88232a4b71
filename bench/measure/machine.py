"""What the numbers were measured on, and what that machine can do at best."""

import functools
import glob
import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

PACKAGES = ["bitsandbytes", "peft", "transformers", "reformer-pytorch", "revtorch", "revlib"]
PACKAGES += ["memcnn", "torchao", "hqq", "gemlite", "unsloth"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _git_commit() -> str:
    """Of a tree without its history, what GIT_COMMIT says."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    here = pathlib.Path(__file__).parent
    try:
        call = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        return found[1].strip() if found else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _isa() -> str:
    parts = [torch.backends.cpu.get_cpu_capability()]
    for name in ("avx512_bf16", "amx_tile"):
        supported = getattr(torch.cpu, f"_is_{name}_supported", None)
        if supported is not None and supported():
            parts.append(name.replace("_", "-").upper())
    return "+".join(parts)


def fast_bf16() -> bool:
    """The CPU has bf16 products."""
    return "BF16" in _isa() or "AMX" in _isa()


def describe(device: str) -> dict[str, object]:
    """The conditions of a run, flat, in the order of the machine line."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts: dict[str, object] = {"cpu": _cpu_model(), "cores": cores, "isa": _isa()}
    if hasattr(os, "getloadavg"):
        facts["load"] = round(os.getloadavg()[0], 2)
    facts |= {"torch": torch.__version__, "triton": _version("triton")}
    facts |= {"pyfast": _version("pyfast-kernels")}
    facts |= {name: _version(name) for name in PACKAGES}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return facts | {"commit": _git_commit(), "date": date}


def short_name(device: str) -> str:
    """A name fit for a file: nvidia-h200, amd-epyc-2c-avx2."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", " ", _cpu_model())
        name = f"{name} {os.cpu_count()}c {_isa()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: str) -> int:
    """The last cache before memory: all L3 of the CPU, L2 of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    shared = {}
    for index in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cache/index3"):
        size = pathlib.Path(index, "size").read_text().strip()
        cores = pathlib.Path(index, "shared_cpu_list").read_text()
        shared[cores] = int(size.removesuffix("K")) << 10
    return sum(shared.values()) or 32 << 20


def _seconds(call: Callable[[], object], device: str) -> float:
    """Of one call. A CPU's best is its ceiling: the slower ones are other programs' doing; a GPU's
    best is a clock that it does not hold."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    times = [once() for _ in range(7)]
    return statistics.median(times) if device == "cuda" else min(times)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy, those read plus those written."""
    size = 4 << 30 if device == "cuda" else max(128 << 20, 4 * cache_bytes(device))
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square product of random numbers, as large as some hundredths of a second allow."""
    size = 8192 if device == "cuda" else 256
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        product = functools.partial(torch.nn.functional.linear, a, b)
        seconds = _seconds(product, device)
        if device == "cuda" or seconds > 0.02 or size == 4096:
            return 2 * size**3 / seconds
        size *= 2


_best: dict[
    tuple[str, str], float
] = {}  # what this process has measured so far, by device and name


def ceilings(device: str, dtypes: list[str], again: bool = False) -> dict[str, float]:
    """Copy bandwidth, and the GEMM rate of each dtype.

    Measured again, the better one counts: a spell of other work on the machine does not pass for
    its ceiling. On a CPU a 16-bit product can always be computed as a float32 one, so where torch
    has no fast 16-bit GEMM (no AVX512-BF16, no AMX) the float32 rate is the ceiling of the narrow
    types too.
    """
    wanted = {"copy": functools.partial(copy_bandwidth, device)}
    for name in [*dtypes, "fp32"] if device == "cpu" else dtypes:
        wanted[f"gemm {name}"] = functools.partial(gemm_rate, DTYPES[name], device)
    for name, measure in wanted.items():
        if again or (device, name) not in _best:
            _best[device, name] = max(measure(), _best.get((device, name), 0.0))
    found = {name: _best[device, name] for name in wanted}
    wide = found.get("gemm fp32", 0.0) if device == "cpu" else 0.0
    return found | {f"ceiling {name}": max(found[f"gemm {name}"], wide) for name in dtypes}
