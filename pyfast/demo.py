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
PATIENCE = 20  # seconds a call; torch's bfloat16 is a naive loop on CPUs without instructions for it


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
    for layer in (dense, half):
        layer.requires_grad_(False)  # frozen, as a fine-tuned model's are
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
    megabytes = sum(t.nbytes for t in theirs.state_dict().values()) / 1e6
    return [*found, Contender("bitsandbytes NF4, bfloat16", theirs, torch.bfloat16, megabytes)]


def _bitsandbytes(dense: nn.Linear, device: torch.device) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict({"weight": dense.weight.cpu()})
    return layer.to(device)


def _time(contenders: list[Contender], rows: int, device: torch.device) -> None:
    """Forward and backward, the contenders in turn; medians. One too slow to wait for is left out."""

    def once(contender: Contender) -> float:
        x = torch.randn(rows, SIZE, device=device, dtype=contender.dtype, requires_grad=True)
        return _seconds(lambda: contender.layer(x).backward(x.detach()), device)

    running = [c for c in contenders if _forecast(c, rows) < PATIENCE]
    seconds = {c.name: [once(c)] for c in running}  # this one warms up, and is all there is of a slow one
    quick = [c for c in running if seconds[c.name][0] < PATIENCE / 20]
    for c in quick:
        seconds[c.name].clear()
    for _ in range(ROUNDS):
        for c in quick:
            seconds[c.name].append(once(c))
    for c in running:
        c.milliseconds[rows] = 1e3 * statistics.median(seconds[c.name])


def _forecast(contender: Contender, rows: int) -> float:
    """Seconds for so many rows, judged by the fewer rows before."""
    if not contender.milliseconds:
        return 0.0
    before, milliseconds = list(contender.milliseconds.items())[-1]
    return 1e-3 * milliseconds * rows / before


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _print(contenders: list[Contender]) -> None:
    heads = "".join(f"{f'{rows} rows':>12}" for rows in ROWS)
    print(f"{'':28}{'weight, MB':>11}{'error':>10}{heads}   ms, forward + backward to the input")
    for c in contenders:
        times = "".join(
            f"{c.milliseconds[rows]:12.2f}" if rows in c.milliseconds else f"{'too slow':>12}" for rows in ROWS
        )
        print(f"{c.name:28}{c.megabytes:11.1f}{c.error:10.2%}{times}")
    ours = next(c for c in contenders if c.name.startswith("pyfast") and c.dtype == torch.bfloat16)
    less = contenders[1].megabytes / ours.megabytes
    print(f"\n{less:.1f}x less memory than bfloat16. The time the others take, {ours.name} being 1:")
    for c in contenders:
        if c is not ours:
            ratios = [c.milliseconds[rows] / ours.milliseconds[rows] for rows in c.milliseconds]
            print(f"  {c.name:26}" + "".join(f"{ratio:8.2f} at {rows} rows" for ratio, rows in zip(ratios, ROWS)))


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
        speed.plot(list(c.milliseconds), list(c.milliseconds.values()), marker="o", label=c.name)
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
