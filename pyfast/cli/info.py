"""The command `info`: what runs on this machine."""

import platform

import torch

from pyfast import __version__
from pyfast._support import extension, registry
from pyfast.ops.registered import nf4 as registered_nf4


def info() -> int:
    """Versions, devices, and the path of each op with its reason."""
    compiled = (
        "with CUDA sources"
        if extension.C.cuda
        else "without CUDA sources (most GPU kernels are Triton's)"
    )
    gpu = (
        f"{torch.cuda.get_device_name()}, sm_{_capability()}"
        if torch.cuda.is_available()
        else _no_gpu()
    )
    lines = {
        "pyfast": f"{__version__}, built for torch {extension.C.torch_version}, {compiled}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python {platform.python_version()}",
        "triton": _triton_version(),
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads, best: {extension.C.machine_isa()}",
        "GPU": gpu,
    }
    for name, text in lines.items():
        print(f"{name:8} {text}")
    print("\nOn the CPU every op is C++: " + extension.C.isa_reason())
    for op in registry.registered():
        print(f"  {op:22} cpu: {extension.C.isa():9} cuda: {_gpu_path(op)}")
    return _gpu_table()


def _gpu_path(op: str) -> str:
    if not torch.cuda.is_available():
        return "-"
    if not registry.has_triton(op):
        return "C++" if extension.C.cuda else "plain torch, built without nvcc"
    return f"plain torch, {why}" if (why := registry.triton_missing()) else "Triton"


def _gpu_table() -> int:
    """Which of its GPU kernels nf4_linear takes, by the number of rows."""
    if registry.triton_missing():
        return 0
    from pyfast.kernels import nf4_linear

    here = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if here else (9, 0)
    where = f"sm_{capability[0]}{capability[1]}" if here else "an H100 or H200, if one were here"
    print(f"\nNF4 on {where}, 4096 x 4096, bfloat16:")
    for op in ("linear", "linear_backward"):
        for rows in (1, 16, 64, 512, 2048, 8192):
            path, why = nf4_linear.choose(op, rows, 4096, 4096, torch.bfloat16, capability)
            if forced := registered_nf4.forced_path():
                path, why = forced, "PYFAST_NF4_PATH"
            print(f"  nf4_{op:16} {rows:5} rows: {path:6} ({why})")
    return 0


def _capability() -> str:
    return "".join(map(str, torch.cuda.get_device_capability()))


def _no_gpu() -> str:
    return "none: " + (
        "torch is a CPU build" if torch.version.cuda is None else "no device is visible"
    )


def _triton_version() -> str:
    if why := registry.triton_missing():
        return why
    import triton

    return triton.__version__
