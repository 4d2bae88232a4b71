"""Plots of a training run. matplotlib is optional, so that a function imports it."""

from collections.abc import Sequence
from pathlib import Path

from pyfast.finetune.learning_rate import RangeTest
from pyfast.formats import file_io


def plot_training(records: Sequence[dict], path: Path) -> str | None:
    """Plot the losses by step; return why there is no plot, or None if there is one."""
    training, evaluation = [], []
    for record in records:
        if "loss" in record:
            training.append((record["step"], record["loss"]))
        if "eval_loss" in record and "restored" not in record:
            evaluation.append((record["step"], record["eval_loss"]))
    lines = {"training": training, "evaluation": evaluation}
    curves = {name: list(zip(*points)) for name, points in lines.items() if points}
    return _plot(path, curves, xlabel="step")


def plot_range(test: RangeTest, path: Path) -> str | None:
    """Plot the loss by learning rate, with the proposal; return why not, or None if it worked."""
    curves = {"loss": (test.rates, test.losses), "smoothed": (test.rates, test.smoothed)}
    return _plot(path, curves, mark=test.proposal, xlabel="learning rate", xscale="log")


def _plot(
    path: Path, curves: dict[str, tuple], mark: float | None = None, **axes: str
) -> str | None:
    try:
        import matplotlib  # optional
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot  # after the choice of a backend that needs no display

    figure, plot = pyplot.subplots(figsize=(7, 4))
    for name, (x, y) in curves.items():
        marker = "o" if len(x) < 20 else None
        plot.plot(x, y, label=name, marker=marker, alpha=0.5 if name == "loss" else 1)
    if mark is not None:
        plot.axvline(mark, linestyle="--", color="gray", label=f"proposal: {mark:g}")
    plot.set(ylabel="loss", **axes)
    plot.legend()
    figure.tight_layout()
    file_io.replace(path, lambda aside: figure.savefig(aside, dpi=120, format="png"))
    pyplot.close(figure)
    return None
