"""The shell commands."""

import argparse
import platform
from pathlib import Path
from typing import NoReturn

import torch

from pyfast import __version__
from pyfast._support import registry
from pyfast.cli import finetune, selftest
from pyfast.demo import run
from pyfast.ops import nf4


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code."""
    parser = _Parser(prog="python -m pyfast")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("info", help="what is installed, what this machine has, which path each op takes")
    command.set_defaults(run=lambda args: info())
    command = commands.add_parser("selftest", help="every op against its reference on this machine")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.set_defaults(run=lambda args: selftest.run(args.device))
    command = commands.add_parser("demo", help="pretrain a small model, fine-tune it in every way; a report")
    command.add_argument("--out", type=Path, default=Path("demo-out"), help="directory of the report (%(default)s)")
    command.add_argument("--quick", action="store_true", help="tiny sizes: seconds, and figures that say little")
    command.set_defaults(run=lambda args: run.run(args.out, args.quick))
    command = commands.add_parser(
        "finetune", help="train a transformers checkpoint on your texts", epilog=finetune.CODES
    )
    finetune.add_finetune(command)
    command.set_defaults(run=finetune.run_finetune)
    command = commands.add_parser("predict", help="what a fine-tuned model says")
    finetune.add_predict(command)
    command.set_defaults(run=finetune.run_predict)
    args = parser.parse_args(argv)
    return args.run(args)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(finetune.WRONG, f"{self.prog.removeprefix('python -m ')}: {message}; -h lists the arguments\n")


def info() -> int:
    """Versions, devices, and the path of each op with its reason."""
    compiled = "with CUDA sources" if registry.C.cuda else "without CUDA sources (most GPU kernels are Triton's)"
    gpu = f"{torch.cuda.get_device_name()}, sm_{_capability()}" if torch.cuda.is_available() else _no_gpu()
    lines = {
        "pyfast": f"{__version__}, built for torch {registry.C.torch_version}, {compiled}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python {platform.python_version()}",
        "triton": _triton_version(),
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads, best: {registry.C.machine_isa()}",
        "GPU": gpu,
    }
    for name, text in lines.items():
        print(f"{name:8} {text}")
    print("\nOn the CPU every op is C++: " + registry.C.isa_reason())
    for op in registry.registered():
        print(f"  {op:22} cpu: {registry.C.isa():9} cuda: {_gpu_path(op)}")
    return _gpu_table()


def _gpu_path(op: str) -> str:
    if not torch.cuda.is_available():
        return "-"
    if not registry.has_triton(op):
        return "C++" if registry.C.cuda else "plain torch, built without nvcc"
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
            if forced := nf4.forced_path():
                path, why = forced, "PYFAST_NF4_PATH"
            print(f"  nf4_{op:16} {rows:5} rows: {path:6} ({why})")
    return 0


def _capability() -> str:
    return "".join(map(str, torch.cuda.get_device_capability()))


def _no_gpu() -> str:
    return "none: " + ("torch is a CPU build" if torch.version.cuda is None else "no device is visible")


def _triton_version() -> str:
    if why := registry.triton_missing():
        return why
    import triton

    return triton.__version__
