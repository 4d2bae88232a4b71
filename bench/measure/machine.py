"""Description of the machine, and measurement of its copy bandwidth and GEMM rates."""

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
    """Return the commit of the checkout; GIT_COMMIT names it where there is no history."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    here = pathlib.Path(__file__).parent
    try:
        call = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    try:
        match = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        return match[1].strip() if match else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _instruction_sets() -> str:
    parts = [torch.backends.cpu.get_cpu_capability()]
    for name in ("avx512_bf16", "amx_tile"):
        is_supported = getattr(torch.cpu, f"_is_{name}_supported", None)
        if is_supported is not None and is_supported():
            parts.append(name.replace("_", "-").upper())
    return "+".join(parts)


def has_fast_bf16() -> bool:
    """Return whether the CPU has instructions for bf16 products."""
    return "BF16" in _instruction_sets() or "AMX" in _instruction_sets()


def describe(device: str) -> dict[str, object]:
    """Return the conditions of a run as a flat dict, in the order they are printed."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts: dict[str, object] = {"cpu": _cpu_model(), "cores": cores, "isa": _instruction_sets()}
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
    """Return a name that is fit for a folder, such as nvidia-h200 or amd-epyc-2c-avx2."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", " ", _cpu_model())
        name = f"{name} {os.cpu_count()}c {_instruction_sets()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: str) -> int:
    """Return the size of the last cache before memory: all L3 of a CPU, L2 of a GPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = {}
    for index in glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cache/index3"):
        size = pathlib.Path(index, "size").read_text().strip()
        cores = pathlib.Path(index, "shared_cpu_list").read_text()
        sizes[cores] = int(size.removesuffix("K")) << 10
    return sum(sizes.values()) or 32 << 20


def _time_best(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, as a ceiling counts them.

    On a CPU the shortest of 7 counts, since longer ones are other programs' doing. On a GPU the
    median counts, since the shortest comes from a clock that the GPU does not hold.
    """

    def time_once() -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    time_once()
    times = [time_once() for _ in range(7)]
    return statistics.median(times) if device == "cuda" else min(times)


def measure_copy_bandwidth(device: str) -> float:
    """Return the bytes a second of a large copy: those read plus those written."""
    size = 4 << 30 if device == "cuda" else max(128 << 20, 4 * cache_bytes(device))
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _time_best(lambda: target.copy_(source), device)


def measure_gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s of a square product of random numbers that takes 0.02 s or more."""
    size = 8192 if device == "cuda" else 256
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        product = functools.partial(torch.nn.functional.linear, a, b)
        seconds = _time_best(product, device)
        if device == "cuda" or seconds > 0.02 or size == 4096:
            return 2 * size**3 / seconds
        size *= 2


# The best rates that this process has measured so far, by device and name.
_best: dict[tuple[str, str], float] = {}


def measure_ceilings(device: str, dtypes: list[str], again: bool = False) -> dict[str, float]:
    """Measure the copy bandwidth, and the GEMM rate of each dtype.

    With `again` they are measured once more and the better rate counts. So a spell of other work
    on the machine does not pass for its ceiling. On a CPU a 16-bit product can always be computed
    in float32. Where torch has no fast 16-bit GEMM (no AVX512-BF16, no AMX), the float32 rate is
    therefore the ceiling of the 16-bit types too.
    """
    measurements = {"copy": functools.partial(measure_copy_bandwidth, device)}
    for name in [*dtypes, "fp32"] if device == "cpu" else dtypes:
        measurements[f"gemm {name}"] = functools.partial(measure_gemm_rate, DTYPES[name], device)
    for name, measure in measurements.items():
        if again or (device, name) not in _best:
            _best[device, name] = max(measure(), _best.get((device, name), 0.0))
    rates = {name: _best[device, name] for name in measurements}
    float32_rate = rates.get("gemm fp32", 0.0) if device == "cpu" else 0.0
    return rates | {f"ceiling {name}": max(rates[f"gemm {name}"], float32_rate) for name in dtypes}
