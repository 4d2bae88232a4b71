r"""Memory of one chunk of tokens: the loss of a language model without its logits, a feed-forward
without its hidden.

    loss = mean over tokens of  log sum_v exp(h w_v) - h w_label          a chunk's logits at a time, never all

`chunked_cross_entropy` finds the gradients together with the loss, while a chunk's logits are
there: the backward only scales them. `sum_of_chunks` does so with any function of chunks of tokens.
`chunked_feed_forward` keeps its input, and computes a chunk's hidden values again in the backward.
`pyfast/reference/_chunked.py` is the specification.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pyfast._support import checks
from pyfast._support import dtypes as _support_dtypes
from pyfast.ops.registered.chunked import (
    LOGITS,
    SLOPES,
    cross_entropy,
)

# --- cross entropy: the products are torch's, on every device ---


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, chunk, ignore_index):
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
        loss, *grads = cross_entropy(hidden, weight, labels, bias, chunk, ignore_index, needs)
        ctx.save_for_backward(*grads)
        ctx.needs, ctx.dtypes = (
            needs,
            (hidden.dtype, weight.dtype, None if bias is None else bias.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        grads = zip(ctx.saved_tensors, ctx.needs, ctx.dtypes)
        d_hidden, d_weight, d_bias = (
            _scaled(g, d_loss, dtype) if need else None for g, need, dtype in grads
        )
        return d_hidden, d_weight, None, d_bias, None, None


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the factor's precision, a piece at a time: 1 / tokens times a loss scale is no number of 16 bits."""
    if grad.dtype == factor.dtype:
        return (grad * factor).to(dtype)
    pieces = [(piece.to(factor.dtype) * factor).to(dtype) for piece in grad.flatten().split(SLOPES)]
    return torch.cat(pieces).view(grad.shape) if pieces else grad.to(dtype)


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
    """F.cross_entropy of hidden weight^T + bias, in float32 at least. Differentiable in hidden,
    weight and bias.

    Args:
        hidden: [..., width], float32, bfloat16 or float16 (and float64); autocast applies.
        weight: [vocabulary, width], of hidden's dtype.
        labels: [...], int64, each below the vocabulary's size, or ignore_index.
        bias: [vocabulary], of hidden's dtype.
        chunk: tokens at a time; by default as many as make 2^25 logits.
        ignore_index: the label of tokens that do not count.
        reduction: "mean" over those that count, 0 if none does; or "sum".
    """
    _check_cross_entropy(hidden, weight, labels, bias, chunk, ignore_index, reduction)
    chunk = max(1, LOGITS // len(weight)) if chunk is None else chunk
    dtype = _support_dtypes.compute_dtype(hidden)
    hidden, weight, bias = (None if t is None else t.to(dtype) for t in (hidden, weight, bias))
    args = (hidden, weight, labels, bias, chunk, ignore_index)
    differentiable = torch.is_grad_enabled() and any(
        t.requires_grad for t in (hidden, weight, bias) if t is not None
    )
    forward_mode = forward_ad._current_level >= 0  # refused there, aloud
    found = (
        _CrossEntropy.apply(*args)
        if differentiable or forward_mode
        else cross_entropy(*args, [False] * 3)[0]
    )
    return found / (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else found


def _check_cross_entropy(hidden, weight, labels, bias, chunk, ignore_index, reduction) -> None:
    checks.tensor("hidden", hidden, checks.FLOATS_AND_DOUBLE)
    checks.tensor("weight", weight, checks.FLOATS_AND_DOUBLE)
    checks.tensor("labels", labels, (torch.int64,))
    if bias is not None:
        checks.tensor("bias", bias, checks.FLOATS_AND_DOUBLE)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise ValueError(f"ignore_index is {ignore_index!r}; it must be an integer")
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [vocabulary, width]")
    checks.last_dim("hidden", hidden, weight.shape[1], "the width of weight")
    checks.shape("labels", labels, hidden.shape[:-1])
    checks.one_of("reduction", reduction, ("mean", "sum"))
    check_chunk(1 if chunk is None else chunk)
    casts = _support_dtypes.autocasts(hidden.device) and hidden.dtype != torch.float64
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None:
            checks.same_device(name, tensor, "hidden", hidden.device)
        if tensor is not None and name != "labels" and not casts:
            checks.same_dtype(name, tensor, "hidden", hidden)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1])
    _check_labels(labels, len(weight), ignore_index)


def check_chunk(chunk: int) -> None:
    checks.size("chunk", chunk)
    if chunk == 0:
        raise ValueError("chunk is 0; it must be at least 1")


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """On a GPU without waiting for it."""
    good = (((labels >= 0) & (labels < vocabulary)) | (labels == ignore_index)).all()
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(good)
    elif not good:
        low, high = labels.aminmax()
        allowed = f"0 to {vocabulary - 1}, or ignore_index, {ignore_index}"
        raise ValueError(f"labels holds numbers from {low} to {high}; they must be {allowed}")


# --- any sum over tokens ---


class _SumOfChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, step, labels, n_tensors, *inputs):
        needs = ctx.needs_input_grad[4:]
        tensors, parameters = inputs[:n_tensors], inputs[n_tensors:]
        wide = [
            x.dtype if i < n_tensors else torch.promote_types(x.dtype, torch.float32)
            for i, x in enumerate(inputs)
        ]
        grads = [
            torch.zeros_like(x, dtype=dtype) if need else None
            for x, need, dtype in zip(inputs, needs, wide)
        ]
        total = None
        for first in range(0, labels.shape[1], step):
            some = slice(first, first + step)
            pieces = [x[:, some].detach().requires_grad_(need) for x, need in zip(tensors, needs)]
            with torch.enable_grad():
                part = function(*pieces, labels[:, some])
            wanted = [x for x, need in zip((*pieces, *parameters), needs) if need]
            found = iter(torch.autograd.grad(part, wanted, allow_unused=True))
            for i, grad in enumerate(grads):
                new = None if grad is None else next(found)
                if new is not None:
                    (grad[:, some] if i < n_tensors else grad).add_(new)
            total = part.detach() if total is None else total + part.detach()
        ctx.save_for_backward(*grads)
        ctx.dtypes = [x.dtype for x in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        grads = zip(ctx.saved_tensors, ctx.dtypes)
        return (
            None,
            None,
            None,
            None,
            *(g if g is None else _scaled(g, d_total, dtype) for g, dtype in grads),
        )


def sum_of_chunks(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    labels: Tensor,
    parameters: Iterable[Tensor],
    step: int,
) -> Tensor:
    """The sum of function(*tensors, labels) over chunks of tokens; its gradients are found with it,
    nothing is kept.

    Args:
        function: of some tokens of all tensors and labels, [batch, tokens, ...]; a sum over them.
        tensors: [batch, tokens, ...]
        labels: [batch, tokens]
        parameters: what else function reads that may require gradients.
        step: tokens of an example at a time.
    """
    trained = [p for p in parameters if p.requires_grad]
    inputs, parts = (*tensors, *trained), zip(*(x.split(step, 1) for x in (*tensors, labels)))
    if (
        not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
        or labels.shape[1] <= step
    ):
        return torch.stack([function(*part) for part in parts]).sum()
    if any(p._backward_hooks for p in trained):  # which are to see the whole gradient, once
        return torch.stack(
            [checkpoint(function, *part, use_reentrant=False) for part in parts]
        ).sum()
    return _SumOfChunks.apply(function, step, labels, len(tensors), *inputs)


# --- feed-forward ---


def chunked_feed_forward(
    ff: Callable[[Tensor], Tensor], x: Tensor, chunk: int, dim: int = -2
) -> Tensor:
    """ff(x), computed for `chunk` tokens at a time and, in the backward, computed again: the memory
    of one chunk.

    Args:
        ff: a function or module that treats tokens alike and by themselves. It is called again in
        the backward, with
            the same random numbers and autocast.
        x: tokens along `dim`.
        chunk: tokens at a time.
        dim: that of the tokens, [..., tokens, width] by default.
    """
    checks.tensor("x", x)
    if not callable(ff):
        raise TypeError(f"ff must be a function or a module, not {type(ff).__name__}")
    check_chunk(chunk)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"dim is {dim} and x has shape {list(x.shape)}; it must be one of its dimensions"
        )
    if x.shape[dim] <= chunk:
        return ff(x)
    pieces = x.split(chunk, dim)
    if not torch.is_grad_enabled():
        return torch.cat([_same_tokens(ff(piece), piece, dim) for piece in pieces], dim)
    return torch.cat(
        [_same_tokens(checkpoint(ff, p, use_reentrant=False), p, dim) for p in pieces], dim
    )


def _same_tokens(y: Tensor, x: Tensor, dim: int) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"ff returned a {type(y).__name__}; it must return a tensor")
    if y.dim() != x.dim() or y.shape[dim] != x.shape[dim]:
        raise ValueError(
            f"ff made {list(y.shape)} of {list(x.shape)}; it must keep the number of tokens"
        )
    return y
