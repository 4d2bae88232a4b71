"""The command `info`: versions, devices, and the path that each op takes on this machine."""

import argparse
import platform

import torch

from pyfast._support import extension, registry
from pyfast._version import __version__
from pyfast.cli.errors import DONE
from pyfast.ops.registered.nf4 import forced_path

SUMMARY = "show what is installed, what this machine has, and which path each op takes"
_TABLE_ROWS = (1, 16, 64, 512, 2048, 8192)
_TABLE_WIDTH = 4096  # in_features and out_features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `info` has no arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices, and the path of each op with its reason."""
    for name, text in _describe_machine().items():
        print(f"{name:8} {text}")
    print("\nOn the CPU every op is C++: " + extension.C.isa_reason())
    for op in registry.registered():
        print(f"  {op:22} cpu: {extension.C.isa():9} cuda: {_gpu_path(op)}")
    if not registry.triton_missing():
        _print_nf4_paths()
    return DONE


def _describe_machine() -> dict[str, str]:
    """Return one line of text for each part of the machine and its software."""
    has_cuda = "with CUDA sources"
    if not extension.C.cuda:
        has_cuda = "without CUDA sources (most GPU kernels are Triton's)"
    cuda, python = torch.version.cuda or "none", platform.python_version()
    threads, isa = torch.get_num_threads(), extension.C.machine_isa()
    return {
        "pyfast": f"{__version__}, built for torch {extension.C.torch_version}, {has_cuda}",
        "torch": f"{torch.__version__}, CUDA {cuda}, Python {python}",
        "triton": _triton_version(),
        "CPU": f"{platform.machine()}, {threads} threads, best: {isa}",
        "GPU": _describe_gpu(),
    }


def _describe_gpu() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {_architecture(_capability())}"
    if torch.version.cuda is None:
        return "none: torch is a CPU build"
    return "none: no device is visible"


def _triton_version() -> str:
    if reason := registry.triton_missing():
        return reason
    import triton  # optional: it exists for Linux only

    return triton.__version__


def _gpu_path(op: str) -> str:
    """Return what the op runs on the GPU, or "-" where there is none."""
    if not torch.cuda.is_available():
        return "-"
    if not registry.has_triton(op):
        return "C++" if extension.C.cuda else "plain torch, built without nvcc"
    reason = registry.triton_missing()
    return f"plain torch, {reason}" if reason else "Triton"


def _print_nf4_paths() -> None:
    """Print which GPU kernel the NF4 products take, by the number of rows."""
    from pyfast.kernels import nf4_linear  # optional: it imports triton

    capability = _capability()
    machine = _architecture(capability)
    if not torch.cuda.is_available():
        machine = "an H100 or H200, if one were here"
    print(f"\nNF4 on {machine}, {_TABLE_WIDTH} x {_TABLE_WIDTH}, bfloat16:")
    for op in ("linear", "linear_backward"):
        for rows in _TABLE_ROWS:
            problem = (op, rows, _TABLE_WIDTH, _TABLE_WIDTH, torch.bfloat16, capability)
            path, reason = nf4_linear.choose(*problem)
            if forced := forced_path():
                path, reason = forced, "PYFAST_NF4_PATH"
            print(f"  nf4_{op:16} {rows:5} rows: {path:6} ({reason})")


def _capability() -> tuple[int, int]:
    """Return the GPU's compute capability, an H100's where there is no GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


def _architecture(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
