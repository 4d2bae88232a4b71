"""Reversible blocks whose backward recomputes the activations.

Autograd's graph of such a run carries gradients only. Its tensors are tokens without data. The
streams themselves are on a tape in C++ (csrc/reversible/tape.cpp).
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function, Variable

from pyfast._support import extension
from pyfast.ops.reversible_arithmetic import StreamArithmetic
from pyfast.ops.reversible_calls import BlockFunction


def _token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of x's shape and one element of memory."""
    return torch.empty_strided(x.shape, [0] * x.dim(), dtype=dtype, device=x.device)


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True does not work through reversible blocks; store=True makes it work"
        )


class _Enter(Function):
    """Autograd node that makes tokens of the two inputs."""

    @staticmethod
    def forward(ctx, x1, x2, dtype):
        ctx.set_materialize_grads(False)
        return _token(x1, dtype), _token(x2, dtype)

    @staticmethod
    def backward(ctx, d1, d2):
        _refuse_create_graph()
        return d1, d2, None


class _Step(Function):
    """Autograd node of one call of F or G, or of a chunk of it.

    Each call has a node of its own. So autograd adds up the gradients of a tensor that many calls
    read as soon as they are there.
    """

    @staticmethod
    def forward(ctx, step, t1, t2, *inputs):
        ctx.step = step
        ctx.set_materialize_grads(False)
        return _token(t1, t1.dtype), _token(t2, t2.dtype)

    @staticmethod
    def backward(ctx, d1, d2):
        _refuse_create_graph()
        if ctx.step is None:
            raise RuntimeError(
                "a second backward through reversible blocks needs retain_graph=True in the first"
            )
        tape, *step = ctx.step
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.step = None
        return None, *tape.backward(*step, d1, d2)


class _Leave(Function):
    """Autograd node that returns the streams after some call; the backward starts from it."""

    @staticmethod
    def forward(ctx, tape, finish, n_calls, is_last, t1, t2):
        streams = tape.streams(is_last)
        ctx.save_for_backward(*streams)
        ctx.tape, ctx.finish, ctx.n_calls = tape, finish, n_calls
        ctx.set_materialize_grads(False)
        return tuple(map(tape.read, streams))

    @staticmethod
    def backward(ctx, d1, d2):
        _refuse_create_graph()
        ctx.tape.resume(ctx.n_calls, *ctx.saved_tensors)
        Variable._execution_engine.queue_callback(
            partial(ctx.finish, torch._C._current_graph_task_id())
        )
        return None, None, None, None, d1, d2


def _finish_backward(tape, arithmetic: StreamArithmetic, task: int) -> None:
    """Drop what is left of a backward, even if it went through some blocks only; check flags."""
    tape.finish(task)
    arithmetic.check_after_backward()


def run_recomputed(
    blocks: list[tuple[BlockFunction, BlockFunction]],
    x1: Tensor,
    x2: Tensor,
    arithmetic: StreamArithmetic,
    hidden: list[tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, Tensor]:
    """Return the streams after all blocks, with a graph that recomputes the activations.

    The streams after each block but the last are appended to `hidden`, if it is a list.
    """
    tokens = _Enter.apply(x1, x2, arithmetic.dtype)
    tape = extension.C.Tape(
        x1.detach(),
        x2.detach(),
        arithmetic.rounding_bits,
        arithmetic.is_fixed_point,
        arithmetic.flags,
    )
    finish = partial(_finish_backward, tape, arithmetic)
    n_calls = 0
    needs_grad = [tokens[0].requires_grad] * 2  # per stream
    for i, block in enumerate(blocks):
        for written, function in enumerate(block):
            read, slot = 1 - written, 2 * i + 2 + written
            x_needs_grad = needs_grad[read]
            for chunk in function.split(x1):
                call = tape.forward(
                    read, chunk, slot, x_needs_grad, chunk.is_fully_sharded(), *chunk.span
                )
                needs_grad[written] |= x_needs_grad or bool(call.inputs)
                n_calls += 1
                if any(needs_grad):
                    step = (tape, n_calls, read, chunk, call)
                    tokens = _Step.apply(step, *tokens, *call.inputs)
        if hidden is not None and i + 1 < len(blocks):
            hidden.append(_Leave.apply(tape, finish, n_calls, False, *tokens))
    arithmetic.check_after_forward(tokens[0].requires_grad, recomputes=True)
    return _Leave.apply(tape, finish, n_calls, True, *tokens)
