"""Chunked cross-entropy as a registered op: check, fake, implementation."""

import torch
from torch import Tensor, nn

from pyfast._support import registry

LOGITS = 1 << 25  # at a time, by default


SLOPES = 1 << 24  # of the weight, at a time


def _cross_entropy(hidden, weight, labels, bias, chunk, ignore_index, needs):
    """The sum in float32 at least, and the gradients of hidden, weight and bias: empty if not needed."""
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = targets != ignore_index
    loss = torch.zeros((), dtype=wide, device=rows.device)
    d_hidden, d_weight, d_bias = _cross_entropy_fake(
        hidden, weight, labels, bias, chunk, ignore_index, needs
    )[1:]
    for grad in (d_weight, d_bias):
        grad.zero_()
    d_rows = d_hidden.view(rows.shape) if needs[0] else None
    for first in range(0, len(rows), chunk):
        some = slice(first, first + chunk)
        logits = nn.functional.linear(rows[some], weight, bias).to(wide)
        label = targets[some].where(kept[some], 0)[:, None]
        of_label, top = logits.gather(-1, label), logits.amax(-1, keepdim=True)
        slopes = logits.sub_(
            top
        ).exp_()  # in place, as is all that follows: there is one such tensor at a time
        total = slopes.sum(-1, keepdim=True)
        loss += (total.log() + (top - of_label))[:, 0].where(kept[some], 0).sum()
        if any(needs):
            slopes.div_(total)
            slopes.scatter_add_(-1, label, slopes.new_full((), -1).expand_as(label))
            slopes.masked_fill_(~kept[some][:, None], 0)
        if needs[2]:
            d_bias += slopes.sum(0)
        narrow = slopes.to(rows.dtype) if needs[0] or needs[1] else None
        if needs[0]:
            torch.mm(narrow, weight, out=d_rows[some])
        if needs[1]:
            _add_outer(d_weight, narrow, rows[some])
        del logits, slopes, narrow  # before the next are there
    return loss, d_hidden, d_weight, d_bias


def _add_outer(to: Tensor, a: Tensor, b: Tensor) -> None:
    """To += a^T b, with little beside it."""
    step = max(1, SLOPES // max(1, b.shape[1]))
    for first in range(0, len(to), step):
        to[first : first + step] += a[:, first : first + step].t() @ b


def _cross_entropy_fake(hidden, weight, labels, bias, chunk, ignore_index, needs):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, wide, wide)
    grads = (
        hidden.new_empty(s if need else (0,), dtype=t) for s, need, t in zip(shapes, needs, dtypes)
    )
    return hidden.new_empty((), dtype=wide), *grads


cross_entropy = registry.register(
    "chunked_cross_entropy",
    fake=_cross_entropy_fake,
    kernel=None,
    reference=_cross_entropy,
    is_composite=True,
)
