"""Reversible blocks that keep their activations, for comparison and for second derivatives."""

import torch
from torch import Tensor
from torch.autograd import Function

from pyfast.ops.registered.reversible import reversible_step
from pyfast.ops.reversible_arithmetic import StreamArithmetic
from pyfast.ops.reversible_calls import BlockFunction


class _Add(Function):
    """Autograd node that returns stream + out in the streams' arithmetic.

    An int32 stream is stored in a float32 tensor of the same bits, because autograd gives integers
    no gradients.
    """

    @staticmethod
    def forward(ctx, stream, out, arithmetic, slot):
        stream = stream.clone()
        values = stream.view(torch.int32) if arithmetic.is_fixed_point else stream
        reversible_step(values, out, False, arithmetic.rounding_bits, arithmetic.flag(slot))
        return stream

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, None, None


class _ReadFixedPoint(Function):
    """Autograd node that converts an int32 stream, stored as float32 bits, to the inputs' dtype."""

    @staticmethod
    def forward(ctx, stream, bits, dtype):
        return (stream.view(torch.int32).float() * 2.0**-bits).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def _call_by_chunks(function: BlockFunction, x: Tensor) -> Tensor:
    """Call each chunk of a function as the recomputing backward does.

    The autocast cache is cleared before each call, so that calls share no cast of a parameter.
    """
    chunks = function.split(x)
    if len(chunks) == 1:
        torch.clear_autocast_cache()
        return chunks[0].record(x)
    dim = chunks[0].span[0]
    lengths = [chunk.span[2] for chunk in chunks]
    outputs = []
    for chunk, x_chunk in zip(chunks, x.split(lengths, dim)):
        torch.clear_autocast_cache()
        outputs.append(chunk.record(x_chunk))
    return torch.cat(outputs, dim)


def run_stored(
    blocks: list[tuple[BlockFunction, BlockFunction]],
    x1: Tensor,
    x2: Tensor,
    arithmetic: StreamArithmetic,
    hidden: list[tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, Tensor]:
    """Return the streams after all blocks, with a graph that keeps the activations.

    The streams after each block but the last are appended to `hidden`, if it is a list. Streams are
    read through views, so that gradients are summed in the order of the recomputing backward.
    """

    def read(stream: Tensor) -> Tensor:
        if arithmetic.is_fixed_point:
            return _ReadFixedPoint.apply(stream, arithmetic.rounding_bits, x1.dtype)
        return stream.view_as(stream) if stream.dtype == x1.dtype else stream.to(x1.dtype)

    streams = [x1, x2]
    if arithmetic.exact:
        for slot, x in enumerate((x1, x2)):
            zeros = torch.zeros_like(x, dtype=torch.float32)
            streams[slot] = _Add.apply(zeros, x, arithmetic, slot)
    for i, block in enumerate(blocks):
        for written, function in enumerate(block):
            out = _call_by_chunks(function, read(streams[1 - written]))
            slot = 2 * i + 2 + written
            streams[written] = _Add.apply(streams[written], out, arithmetic, slot)
        if hidden is not None and i + 1 < len(blocks):
            streams = [stream.view_as(stream) for stream in streams]
            hidden.append(tuple(map(read, streams)))
            streams = [stream.view_as(stream) for stream in streams]
    torch.clear_autocast_cache()
    differentiable = any(stream.requires_grad for stream in streams)
    arithmetic.check_after_forward(differentiable, recomputes=False)
    return tuple(map(read, streams))
