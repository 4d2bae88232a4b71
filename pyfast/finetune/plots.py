"""Plots of a training run."""

from collections.abc import Sequence
from pathlib import Path

from pyfast.finetune.learning_rate import RangeTest
from pyfast.formats import file_io


def plot_training(records: Sequence[dict], path: Path) -> str | None:
    """Draws the losses; why not, if it can't."""
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    judged = [
        (r["step"], r["eval_loss"]) for r in records if "eval_loss" in r and "restored" not in r
    ]
    lines = {"training": train, "evaluation": judged}
    return _plot(
        path, {name: list(zip(*points)) for name, points in lines.items() if points}, xlabel="step"
    )


def plot_range(test: RangeTest, path: Path) -> str | None:
    """Draws the loss by the rate, and the proposal; why not, if it can't."""
    lines = {"loss": (test.rates, test.losses), "smoothed": (test.rates, test.smoothed)}
    return _plot(path, lines, mark=test.proposal, xlabel="learning rate", xscale="log")


def _plot(
    path: Path, lines: dict[str, tuple], mark: float | None = None, **axes: str
) -> str | None:
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(7, 4))
    for name, (x, y) in lines.items():
        plot.plot(
            x,
            y,
            label=name,
            marker="o" if len(x) < 20 else None,
            alpha=0.5 if name == "loss" else 1,
        )
    if mark is not None:
        plot.axvline(mark, linestyle="--", color="gray", label=f"proposal: {mark:g}")
    plot.set(ylabel="loss", **axes)
    plot.legend()
    figure.tight_layout()
    file_io.replace(path, lambda aside: figure.savefig(aside, dpi=120, format="png"))
    pyplot.close(figure)
    return None
