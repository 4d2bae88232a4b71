"""Reversible blocks that recompute what they do not store."""

from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function, Variable

from pyfast._support import extension
from pyfast.ops.reversible_arithmetic import _Arithmetic
from pyfast.ops.reversible_calls import Half


def _token(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(x.shape, [0] * x.dim(), dtype=dtype, device=x.device)


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True does not work through reversible blocks; store=True makes it work"
        )


class _Enter(Function):
    @staticmethod
    def forward(ctx, x1, x2, dtype):
        ctx.set_materialize_grads(False)
        return _token(x1, dtype), _token(x2, dtype)

    @staticmethod
    def backward(ctx, d1, d2):
        _refuse_create_graph()
        return d1, d2, None


class _Step(Function):
    """A call of F or G. One node for each: then autograd sums the gradients of what many read, as they come."""

    @staticmethod
    def forward(ctx, call, t1, t2, *inputs):
        ctx.call = call
        ctx.set_materialize_grads(False)
        return _token(t1, t1.dtype), _token(t2, t2.dtype)

    @staticmethod
    def backward(ctx, d1, d2):
        _refuse_create_graph()
        if ctx.call is None:
            raise RuntimeError(
                "a second backward through reversible blocks needs retain_graph=True in the first"
            )
        tape, *call = ctx.call
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.call = None
        return None, *tape.backward(*call, d1, d2)


class _Leave(Function):
    @staticmethod
    def forward(ctx, tape, finish, at, last, t1, t2):
        streams = tape.streams(last)
        ctx.save_for_backward(*streams)
        ctx.tape, ctx.finish, ctx.at = tape, finish, at
        ctx.set_materialize_grads(False)
        return tuple(map(tape.read, streams))

    @staticmethod
    def backward(ctx, d1, d2):
        _refuse_create_graph()
        ctx.tape.resume(ctx.at, *ctx.saved_tensors)
        Variable._execution_engine.queue_callback(
            partial(ctx.finish, torch._C._current_graph_task_id())
        )
        return None, None, None, None, d1, d2


def _finish(tape, arithmetic: _Arithmetic, task: int) -> None:
    """At the end of a backward, be it one of some blocks only."""
    tape.finish(task)
    arithmetic.after_backward()


def _recomputed(
    blocks: list[tuple[Half, Half]], x1: Tensor, x2: Tensor, arithmetic: _Arithmetic, hidden
):
    tokens = _Enter.apply(x1, x2, arithmetic.dtype)
    tape = extension.C.Tape(
        x1.detach(), x2.detach(), arithmetic.bits, arithmetic.fixed, arithmetic.flags
    )
    finish, made = partial(_finish, tape, arithmetic), 0
    needs = [tokens[0].requires_grad] * 2  # of the streams
    for i, halves in enumerate(blocks):
        for which, half in enumerate(halves):
            reads, slot = 1 - which, 2 * i + 2 + which
            x_needs = needs[reads]
            for step in half.steps(x1):
                call = tape.forward(reads, step, slot, x_needs, step.accumulates(), *step.span)
                needs[which] |= x_needs or bool(call.inputs)
                made += 1
                if any(needs):
                    tokens = _Step.apply((tape, made, reads, step, call), *tokens, *call.inputs)
        if hidden is not None and i + 1 < len(blocks):
            hidden.append(_Leave.apply(tape, finish, made, False, *tokens))
    arithmetic.after_forward(tokens[0].requires_grad, replayed=True)
    return _Leave.apply(tape, finish, made, True, *tokens)
