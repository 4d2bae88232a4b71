"""Chunked cross-entropy as a registered op: fake, implementation in torch's own products."""

import torch
from torch import Tensor, nn

from pyfast._support import registry
from pyfast._support.dtypes import sum_dtype

MAX_LOGITS = 1 << 25  # of a chunk, by default
MAX_GRADIENTS = 1 << 24  # elements of the weight's gradient that are computed at a time


def _cross_entropy_fake(hidden, weight, labels, bias, chunk, ignore_index, needs):
    dtype = sum_dtype(hidden)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, dtype, dtype)
    grads = [
        hidden.new_empty(shape if need else (0,), dtype=grad_dtype)
        for shape, need, grad_dtype in zip(shapes, needs, dtypes)
    ]
    return hidden.new_empty((), dtype=dtype), *grads


def _cross_entropy(hidden, weight, labels, bias, chunk, ignore_index, needs):
    """Return the loss's sum in float32 or float64, and the gradients, empty if not needed.

    Only one tensor of a chunk's logits exists at a time: all that follows them is in place.
    """
    _, d_hidden, d_weight, d_bias = _cross_entropy_fake(
        hidden, weight, labels, bias, chunk, ignore_index, needs
    )
    d_weight.zero_()
    d_bias.zero_()
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    d_rows = d_hidden.view(rows.shape) if needs[0] else None
    is_counted = targets != ignore_index
    loss = torch.zeros((), dtype=sum_dtype(hidden), device=rows.device)
    for first in range(0, len(rows), chunk):
        part = slice(first, first + chunk)
        logits = nn.functional.linear(rows[part], weight, bias).to(loss.dtype)
        label, counted = targets[part].where(is_counted[part], 0)[:, None], is_counted[part]
        label_logit, max_logit = logits.gather(-1, label), logits.amax(-1, keepdim=True)
        exps = logits.sub_(max_logit).exp_()
        total = exps.sum(-1, keepdim=True)
        loss += (total.log() + (max_logit - label_logit))[:, 0].where(counted, 0).sum()
        if any(needs):
            d_logits = exps.div_(total)
            d_logits.scatter_add_(-1, label, d_logits.new_full((), -1).expand_as(label))
            d_logits.masked_fill_(~counted[:, None], 0)
            if needs[2]:
                d_bias += d_logits.sum(0)
            rounded = d_logits.to(rows.dtype) if needs[0] or needs[1] else None
            if needs[0]:
                torch.mm(rounded, weight, out=d_rows[part])
            if needs[1]:
                _add_outer(d_weight, rounded, rows[part])
            del d_logits, rounded
        del logits, exps  # before the next chunk's exist
    return loss, d_hidden, d_weight, d_bias


def _add_outer(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b to `out` in place, some rows at a time."""
    step = max(1, MAX_GRADIENTS // max(1, b.shape[1]))
    for first in range(0, len(out), step):
        out[first : first + step] += a[:, first : first + step].t() @ b


cross_entropy = registry.register(
    "chunked_cross_entropy",
    fake=_cross_entropy_fake,
    kernel=None,
    reference=_cross_entropy,
    is_composite=True,
)
