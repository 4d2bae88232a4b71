"""Reversible blocks that store their activations."""

import torch
from torch import Tensor
from torch.autograd import Function

from pyfast.ops.registered.reversible import _step
from pyfast.ops.reversible_arithmetic import _Arithmetic
from pyfast.ops.reversible_calls import Half


class _Add(Function):
    """Streams of integers are seen as floats, for their gradients."""

    @staticmethod
    def forward(ctx, stream, out, arithmetic, slot):
        stream = stream.clone()
        values = stream.view(torch.int32) if arithmetic.fixed else stream
        _step(values, out, False, arithmetic.bits, arithmetic.flag(slot))
        return stream

    @staticmethod
    def backward(ctx, d):
        return d, d, None, None


class _Read(Function):
    @staticmethod
    def forward(ctx, stream, bits, dtype):
        return (stream.view(torch.int32).float() * 2.0**-bits).to(dtype)

    @staticmethod
    def backward(ctx, d):
        return d, None, None


def _all_at_once(half: Half, x: Tensor) -> Tensor:
    """Of its steps' spans, each as the recomputing backward sees it: no cast of a parameter is shared between calls."""
    steps, found = half.steps(x), []
    dim, _, size = steps[0].span
    for step, part in zip(steps, [x] if size < 0 else x.split(size, dim)):
        torch.clear_autocast_cache()
        found.append(step.first(part))
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _stored(
    blocks: list[tuple[Half, Half]], x1: Tensor, x2: Tensor, arithmetic: _Arithmetic, hidden
):
    """Views, so that gradients are summed in the order in which the recomputing backward does."""

    def read(stream: Tensor) -> Tensor:
        if arithmetic.fixed:
            return _Read.apply(stream, arithmetic.bits, x1.dtype)
        return stream.view_as(stream) if stream.dtype == x1.dtype else stream.to(x1.dtype)

    streams = [x1, x2]
    if arithmetic.exact:
        zeros = (torch.zeros_like(x, dtype=torch.float32) for x in streams)
        streams = [
            _Add.apply(zero, x, arithmetic, i) for i, (zero, x) in enumerate(zip(zeros, streams))
        ]
    for i, block in enumerate(blocks):
        for which, half in enumerate(block):
            out = _all_at_once(half, read(streams[1 - which]))
            streams[which] = _Add.apply(streams[which], out, arithmetic, 2 * i + 2 + which)
        if hidden is not None and i + 1 < len(blocks):
            streams = [s.view_as(s) for s in streams]
            hidden.append(tuple(map(read, streams)))
            streams = [s.view_as(s) for s in streams]
    torch.clear_autocast_cache()
    arithmetic.after_forward(any(s.requires_grad for s in streams), replayed=False)
    return tuple(map(read, streams))
