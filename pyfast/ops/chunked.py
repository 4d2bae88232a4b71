r"""Losses and feed-forwards that need the memory of one chunk of tokens.

    loss = mean over tokens of  log sum_v exp(h w_v) - h w_label        a chunk's logits at a time

`chunked_cross_entropy` is the loss of a language model. It computes the gradients together with the
loss, while a chunk's logits exist; the backward only scales them. `sum_of_chunks` does so with any
function of chunks of tokens. `chunked_feed_forward` keeps its input, and recomputes a chunk's
hidden values in the backward.

`pyfast/reference/_chunked.py` is the specification.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pyfast._support import checks, dtypes
from pyfast.ops.registered.chunked import MAX_GRADIENTS, MAX_LOGITS, cross_entropy

# --- checks ---


def check_chunk(chunk: int) -> None:
    """Raise unless a chunk is an integer, 1 or more."""
    checks.size("chunk", chunk)
    if chunk == 0:
        raise ValueError("chunk is 0; it must be at least 1")


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
    casts = dtypes.autocasts(hidden.device) and hidden.dtype != torch.float64
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None:
            checks.same_device(name, tensor, "hidden", hidden.device)
        if tensor is not None and name != "labels" and not casts:
            checks.same_dtype(name, tensor, "hidden", hidden)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1])
    _check_labels(labels, len(weight), ignore_index)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise unless all labels are in range. A GPU is not waited for: the error comes later."""
    in_range = (((labels >= 0) & (labels < vocabulary)) | (labels == ignore_index)).all()
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(in_range)
    elif not in_range:
        low, high = labels.aminmax()
        allowed = f"0 to {vocabulary - 1}, or ignore_index, {ignore_index}"
        raise ValueError(f"labels holds numbers from {low} to {high}; they must be {allowed}")


# --- cross entropy ---


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, chunk, ignore_index):
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        loss, *grads = cross_entropy(hidden, weight, labels, bias, chunk, ignore_index, needs)
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_weight, d_bias = (
            _scale(grad, d_loss, dtype) if need else None
            for grad, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes)
        )
        return d_hidden, d_weight, None, d_bias, None, None


def _scale(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * factor, multiplied in the factor's dtype, a piece at a time.

    16 bits cannot hold 1 / tokens times a loss scale.
    """
    if grad.dtype == factor.dtype:
        return (grad * factor).to(dtype)
    pieces = []
    for piece in grad.flatten().split(MAX_GRADIENTS):
        pieces.append((piece.to(factor.dtype) * factor).to(dtype))
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
    """Return the cross entropy of the logits hidden weight^T + bias, a chunk of tokens at a time.

    Differentiable in hidden, weight and bias. Sums are in float32, or float64 for float64.

    Args:
        hidden: [..., width], float32, bfloat16 or float16 (and float64). Autocast applies.
        weight: [vocabulary, width], in hidden's dtype.
        labels: [...], int64, each below the vocabulary's size, or ignore_index.
        bias: [vocabulary], in hidden's dtype. Default: none.
        chunk: Tokens at a time. Default: as many as make 2^25 logits.
        ignore_index: The label of tokens that do not count.
        reduction: "mean" over the tokens that count, 0 if none does, or "sum".

    Returns:
        The loss, a scalar in float32 or float64.

    Example:
        >>> import torch, pyfast
        >>> hidden, weight = torch.randn(2, 50, 32), torch.randn(1000, 32)
        >>> labels = torch.randint(1000, (2, 50))
        >>> pyfast.chunked_cross_entropy(hidden, weight, labels, chunk=16).shape
        torch.Size([])
    """
    _check_cross_entropy(hidden, weight, labels, bias, chunk, ignore_index, reduction)
    chunk = max(1, MAX_LOGITS // len(weight)) if chunk is None else chunk
    dtype = dtypes.compute_dtype(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    args = (hidden, weight, labels, bias, chunk, ignore_index)
    if dtypes.needs_graph(hidden, weight, bias):
        total = _CrossEntropy.apply(*args)
    else:
        total = cross_entropy(*args, [False] * 3)[0]
    if reduction == "sum":
        return total
    return total / (labels != ignore_index).sum().clamp(min=1)


# --- any sum over tokens ---


class _SumOfChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, step, labels, n_tensors, *inputs):
        needs = ctx.needs_input_grad[4:]
        tensors, parameters = inputs[:n_tensors], inputs[n_tensors:]
        grads = []
        for i, (x, need) in enumerate(zip(inputs, needs)):
            # A parameter's gradient is a sum over chunks.
            dtype = x.dtype if i < n_tensors else dtypes.sum_dtype(x)
            grads.append(torch.zeros_like(x, dtype=dtype) if need else None)
        total = None
        for first in range(0, labels.shape[1], step):
            part = slice(first, first + step)
            pieces = [x[:, part].detach().requires_grad_(need) for x, need in zip(tensors, needs)]
            with torch.enable_grad():
                value = function(*pieces, labels[:, part])
            differentiable = [x for x, need in zip((*pieces, *parameters), needs) if need]
            new_grads = iter(torch.autograd.grad(value, differentiable, allow_unused=True))
            for i, grad in enumerate(grads):
                new_grad = None if grad is None else next(new_grads)
                if new_grad is not None:
                    (grad[:, part] if i < n_tensors else grad).add_(new_grad)
            total = value.detach() if total is None else total + value.detach()
        ctx.save_for_backward(*grads)
        ctx.dtypes = [x.dtype for x in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        grads = [
            None if grad is None else _scale(grad, d_total, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return None, None, None, None, *grads


def sum_of_chunks(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    labels: Tensor,
    parameters: Iterable[Tensor],
    step: int,
) -> Tensor:
    """Return the sum of function(*tensors, labels) over chunks of tokens.

    The gradients are computed together with the sum, so that nothing of a chunk is kept.

    Args:
        function: Takes some tokens of all tensors and of the labels, and returns a sum over them.
        tensors: [batch, tokens, ...] each.
        labels: [batch, tokens].
        parameters: What else the function reads that may require gradients.
        step: Tokens of an example at a time.
    """
    trained = [p for p in parameters if p.requires_grad]
    inputs = (*tensors, *trained)
    parts = zip(*(x.split(step, 1) for x in (*tensors, labels)))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if not needs_grad or labels.shape[1] <= step:
        return torch.stack([function(*part) for part in parts]).sum()
    if any(p._backward_hooks for p in trained):  # these must see the whole gradient, once
        values = [checkpoint(function, *part, use_reentrant=False) for part in parts]
        return torch.stack(values).sum()
    return _SumOfChunks.apply(function, step, labels, len(tensors), *inputs)


# --- feed-forward ---


def chunked_feed_forward(
    ff: Callable[[Tensor], Tensor], x: Tensor, chunk: int, dim: int = -2
) -> Tensor:
    """Return ff(x), computed for `chunk` tokens at a time, with the memory of one chunk.

    Args:
        ff: A function or module that treats tokens alike and each by itself. It is called again in
            the backward, with the same random numbers and autocast.
        x: A tensor with tokens along `dim`.
        chunk: Tokens at a time.
        dim: The dimension of the tokens. Default: [..., tokens, width].

    Returns:
        ff(x).

    Example:
        >>> import torch, pyfast
        >>> ff = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU())
        >>> pyfast.chunked_feed_forward(ff, torch.randn(2, 100, 8), chunk=25).shape
        torch.Size([2, 100, 32])
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
    outputs = []
    for piece in x.split(chunk, dim):
        recompute = torch.is_grad_enabled()
        y = checkpoint(ff, piece, use_reentrant=False) if recompute else ff(piece)
        _check_tokens(y, piece, dim)
        outputs.append(y)
    return torch.cat(outputs, dim)


def _check_tokens(y: object, x: Tensor, dim: int) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"ff returned a {type(y).__name__}; it must return a tensor")
    if y.dim() != x.dim() or y.shape[dim] != x.shape[dim]:
        raise ValueError(
            f"ff made {list(y.shape)} of {list(x.shape)}; it must keep the number of tokens"
        )
