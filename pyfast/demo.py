"""The demo: a linear layer in 4 bits beside the same layer in 32 and 16 bits, and beside bitsandbytes."""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pyfast.nf4 import NF4Linear

SIZE = 4096
ROWS = (1, 64, 512)
ROUNDS = 5


@dataclass
class Contender:
    """A layer and what is measured of it."""

    name: str
    layer: nn.Module
    dtype: torch.dtype
    megabytes: float
    error: float = 0.0
    milliseconds: dict[int, float] = field(default_factory=dict)


def run(folder: Path) -> int:
    """Measures, prints the table, writes demo.png."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"A {SIZE} x {SIZE} linear layer on {_describe(device)}\n")
    contenders = _contenders(device)
    exact = contenders[0].layer.weight.detach()
    x = torch.randn(64, SIZE, device=device)
    for contender in contenders:
        y = contender.layer(x.to(contender.dtype)).double()
        true = x.double() @ exact.double().t()
        contender.error = ((y - true).norm() / true.norm()).item()
    for rows in ROWS:
        _time(contenders, rows, device)
    _print(contenders)
    _plot(contenders, folder / "demo.png")
    return 0


@torch.no_grad()
def _contenders(device: torch.device) -> list[Contender]:
    dense = nn.Linear(SIZE, SIZE, bias=False, device=device)
    half = nn.Linear(SIZE, SIZE, bias=False, device=device, dtype=torch.bfloat16)
    half.weight.copy_(dense.weight)
    ours = NF4Linear.from_linear(dense)
    found = [
        Contender("torch float32", dense, torch.float32, dense.weight.nbytes / 1e6),
        Contender("torch bfloat16", half, torch.bfloat16, half.weight.nbytes / 1e6),
        Contender("pyfast NF4, bfloat16", ours, torch.bfloat16, ours.nf4_weight.nbytes / 1e6),
        Contender("pyfast NF4, float32", ours, torch.float32, ours.nf4_weight.nbytes / 1e6),
    ]
    try:
        theirs = _bitsandbytes(dense, device)
    except ImportError as error:
        print(f"bitsandbytes is not here to compare with: {error}\n")
        return found
    return [*found, Contender("bitsandbytes NF4, bfloat16", theirs, torch.bfloat16, ours.nf4_weight.nbytes / 1e6)]


def _bitsandbytes(dense: nn.Linear, device: torch.device) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict({"weight": dense.weight.cpu()})
    return layer.to(device)


def _time(contenders: list[Contender], rows: int, device: torch.device) -> None:
    """Forward and backward, the contenders in turn; medians."""
    rounds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for round_ in range(ROUNDS + 1):
        for contender in contenders:
            x = torch.randn(rows, SIZE, device=device, dtype=contender.dtype, requires_grad=True)
            seconds = _seconds(lambda: contender.layer(x).backward(x.detach()), device)  # noqa: B023
            if round_:  # the first warms up
                rounds[contender.name].append(seconds)
    for contender in contenders:
        contender.milliseconds[rows] = 1e3 * statistics.median(rounds[contender.name])


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _print(contenders: list[Contender]) -> None:
    rows = "".join(f"{f'{rows} rows':>12}" for rows in ROWS)
    print(f"{'':28}{'weight, MB':>11}{'error':>10}{rows}   ms, forward + backward to the input")
    for c in contenders:
        times = "".join(f"{c.milliseconds[rows]:12.2f}" for rows in ROWS)
        print(f"{c.name:28}{c.megabytes:11.1f}{c.error:10.2%}{times}")
    torchs, ours = contenders[1], contenders[2]
    ratios = ", ".join(f"{torchs.milliseconds[r] / ours.milliseconds[r]:.1f}x" for r in ROWS)
    print(f"\n{torchs.megabytes / ours.megabytes:.1f}x less memory than bfloat16; {ratios} its speed at {ROWS} rows")


def _plot(contenders: list[Contender], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, speed) = pyplot.subplots(1, 2, figsize=(11, 4))
    names = [c.name for c in contenders]
    memory.barh(names, [c.megabytes for c in contenders])
    memory.invert_yaxis()
    memory.set_xlabel("weight, MB")
    for c in contenders:
        speed.plot(ROWS, [c.milliseconds[rows] for rows in ROWS], marker="o", label=c.name)
    speed.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms, forward + backward")
    speed.set_title(f"{SIZE} x {SIZE} linear layer")
    speed.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"the CPU, {torch.get_num_threads()} threads"
