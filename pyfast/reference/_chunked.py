"""Chunked functions, computed for all tokens at once."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from pyfast._support.dtypes import sum_dtype


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross entropy in float32 or float64; the mean over no tokens is 0."""
    logits = F.linear(hidden, weight, bias).to(sum_dtype(hidden)).reshape(-1, len(weight))
    total = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else total


def chunked_feed_forward(
    ff: Callable[[Tensor], Tensor], x: Tensor, chunk: int, dim: int = -2
) -> Tensor:
    """Return ff(x)."""
    return ff(x)
