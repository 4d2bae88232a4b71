r"""Reversible blocks: what a backward needs is computed again from the outputs, so that depth costs no memory.

    y1 = x1 + F(x2)        x2 = y2 - G(y1)
    y2 = x2 + G(y1)        x1 = y1 - F(x2)

The backward of a block calls G once more on y1 and F on x2, with gradients, and subtracts. In floating point x + f - f
is not x: bf16 streams are off by a few percent after 48 blocks. With `exact` they are not: streams and summands are
multiples of 2^-k, whose sums are exact as long as they fit, so that every gradient is, bit for bit, that of a network
which keeps its activations (`store=True`). Rounding is a straight line to the gradient.

The engine is C++ (csrc/reversible/tape.cpp; what it knows of a call: csrc/reversible/replay.h and reversible_call.py; arithmetic:
csrc/cpu/reversible/step.cpp).
State lives in the graph of one run, never on a module. `pyfast/reference/_reversible.py` is the specification.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Function, Variable

from pyfast import reference
from pyfast._support import checks, registry
from pyfast.ops.reversible_calls import SIXTEEN_BITS, Given, Half, Narrow

_MODES = ("auto", True, "int32", False)

# --- the op: CPU kernel in csrc/cpu/reversible/step.cpp, GPU kernel in csrc/cuda/reversible.cu ---


def _step_fake(stream, out, subtract, bits, flag):
    if (out.shape, out.device) != (stream.shape, stream.device):
        found, wanted = (f"{list(t.shape)} on {t.device}" for t in (out, stream))
        raise ValueError(f"out is {found}; it must be as stream, {wanted}")


_step = registry.register("reversible_step", fake=_step_fake, cuda=None, reference=reference.reversible_step_op)

# --- arithmetic: what a stream is, and what may go wrong ---


class _Arithmetic:
    """How the streams of one run are kept, and its overflow flags: of x1, x2, F0, G0, F1, ..., and a spare one."""

    def __init__(self, exact: bool | str, bits: int, x: Tensor, n_blocks: int) -> None:
        self.exact, self.fixed, self.fraction_bits = exact, exact == "int32", bits
        self.bits = bits if exact else -1
        self.dtype = torch.float32 if exact else x.dtype  # of the streams' gradients, and of streams but int32 ones
        self.flags = torch.zeros(2 * n_blocks + 3, dtype=torch.int32, device=x.device)
        self.copy = self.copied = None

    def flag(self, slot: int) -> Tensor:
        return self.flags[slot : slot + 1]

    def after_forward(self, differentiable: bool, replayed: bool) -> None:
        """Looks at the flags; where that means to wait for a GPU, in the backward, when the forward is long done.

        Without gradients nothing is computed again, and floats are as good as any beyond the bound; integers are not.
        """
        if not self.exact or self.flags.is_meta or not (differentiable or self.fixed):
            return
        if self.flags.is_cuda and differentiable and replayed:
            self.copy = torch.empty_like(self.flags, device="cpu", pin_memory=True)
            self.copy.copy_(self.flags, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self._raise_for(self.flags.tolist())

    def after_backward(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self._raise_for(self.copy.tolist())

    def _raise_for(self, flags: list[int]) -> None:
        slot = next((i for i, flag in enumerate(flags[:-1]) if flag), None)
        if slot is None:
            return
        where = f"x{slot + 1}" if slot < 2 else _name((slot - 2) // 2, slot % 2)
        mode = f"exact={self.exact!r}, fraction_bits={self.fraction_bits}"
        if flags[slot] == 2:
            raise FloatingPointError(
                f"{where} has a value that is not finite; with {mode} all must be (exact=False lets them through)"
            )
        bound = 2 ** ((31 if self.fixed else 24) - self.fraction_bits)
        cure = "" if self.fixed else f'exact="int32" for up to {2 ** (31 - self.fraction_bits)}, or '
        raise OverflowError(
            f"with {where} a stream reached {bound}, the end of {mode}; use {cure}fewer fraction_bits, or exact=False"
        )


def _name(block: int, half: int) -> str:
    return f"blocks[{block}][{half}] ({'FG'[half]})"


# --- the graph of a run: it carries no data but gradients; the streams are on the tape ---


def _token(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(x.shape, [0] * x.dim(), dtype=dtype, device=x.device)


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True does not work through reversible blocks; store=True makes it work")


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
            raise RuntimeError("a second backward through reversible blocks needs retain_graph=True in the first")
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
        Variable._execution_engine.queue_callback(partial(ctx.finish, torch._C._current_graph_task_id()))
        return None, None, None, None, d1, d2


def _finish(tape, arithmetic: _Arithmetic, task: int) -> None:
    """At the end of a backward, be it one of some blocks only."""
    tape.finish(task)
    arithmetic.after_backward()


def _recomputed(blocks: list[tuple[Half, Half]], x1: Tensor, x2: Tensor, arithmetic: _Arithmetic, hidden):
    tokens = _Enter.apply(x1, x2, arithmetic.dtype)
    tape = registry.C.Tape(x1.detach(), x2.detach(), arithmetic.bits, arithmetic.fixed, arithmetic.flags)
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


# --- the same with stored activations ---


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


def _stored(blocks: list[tuple[Half, Half]], x1: Tensor, x2: Tensor, arithmetic: _Arithmetic, hidden):
    """Views, so that gradients are summed in the order in which the recomputing backward does."""

    def read(stream: Tensor) -> Tensor:
        if arithmetic.fixed:
            return _Read.apply(stream, arithmetic.bits, x1.dtype)
        return stream.view_as(stream) if stream.dtype == x1.dtype else stream.to(x1.dtype)

    streams = [x1, x2]
    if arithmetic.exact:
        zeros = (torch.zeros_like(x, dtype=torch.float32) for x in streams)
        streams = [_Add.apply(zero, x, arithmetic, i) for i, (zero, x) in enumerate(zip(zeros, streams))]
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


# --- the function ---


@torch.compiler.disable  # with all that it calls: a replay runs outside of what is compiled around the forward
def reversible(
    blocks: Sequence[tuple[Callable, Callable]],
    x1: Tensor,
    x2: Tensor,
    *args,
    exact: bool | str = "auto",
    fraction_bits: int = 16,
    store: bool = False,
    return_hidden: bool = False,
    f_kwargs: Mapping | Sequence[Mapping] | None = None,
    g_kwargs: Mapping | Sequence[Mapping] | None = None,
    **kwargs,
) -> tuple[Tensor, ...]:
    """y1 = x1 + F(x2), y2 = x2 + G(y1), block after block; the memory of a backward is that of one block.

    F and G are called as they are, hooks and all, once in the forward and once in the backward, with the same random
    numbers (of torch's own generators) and autocast. They must then do the same. That parameters, arguments and tensors
    captured by a function are unchanged, and the modes (train or eval) of F and G, is checked; what else they depend on
    is not. An F with a choice to hand on has an attribute `keeps = True`, and gets a dict `kept`, empty at first, that
    comes back as F left it. Gradients reach whatever F and G read: parameters, captured tensors, arguments of any
    structure; under FSDP2's fully_shard too, of the whole or of modules in it. What F changes, such as running
    statistics, it changes twice. Threads share torch's generators: where several draw from them at once, none can be
    replayed.

    Args:
        blocks: [(f, g), ...], modules or other callables of a tensor that return one of its shape.
        x1: float32, bfloat16, float16 or float64.
        x2: the other stream, like x1; it may be x1.
        *args: for every F and G, after the stream, as are **kwargs.
        exact: True: streams are float32 multiples of 2^-fraction_bits below 2^(24 - fraction_bits), 256. Beyond, or if
            a value is not finite, OverflowError or FloatingPointError: in the forward, or if gradients are computed on
            a GPU, which is not waited for, at the end of the backward. Where nothing requires gradients neither is
            checked: the same bits below, floats as ever beyond, NaN and inf pass. "int32": in fixed point, below
            2^(31 - fraction_bits), 32768, always checked: without gradients a GPU is waited for. False: streams are
            what x1 is and sums are rounded; nothing is checked. "auto": True if x1, autocast or what an F or G returns
            has 16 bits, else False. A first 16-bit result from 32-bit streams starts the forward again: say True to
            save that.
        fraction_bits: 0 to 23, with "int32" to 30.
        store: keep activations, as torch does: for comparison, short sequences, second derivatives. The same bits.
        return_hidden: also the streams after each block. They are kept: it costs what it says.
        f_kwargs: for every F alone; or a sequence, of one mapping a block.
        g_kwargs: for every G alone, likewise.

    Returns:
        (y1, y2), or with return_hidden (y1, y2, [(h1, h2), ...]), all in the dtype of x1.
    """
    functions = _pairs(blocks)
    _check_streams(x1, x2)
    undecided, exact = _resolve(exact, x1, fraction_bits)
    per_block = (_per_block("f_kwargs", f_kwargs, len(functions)), _per_block("g_kwargs", g_kwargs, len(functions)))

    def run(exact: bool | str, wide: bool) -> tuple[Tensor, ...]:
        given = Given(functions, (args, kwargs, per_block))
        halves = [
            tuple(Half(_name(i, j), pair[j], args, {**kwargs, **per_block[j][i]}, wide, given) for j in (0, 1))
            for i, pair in enumerate(functions)
        ]
        hidden = [] if return_hidden else None
        arithmetic = _Arithmetic(exact, fraction_bits, x1, len(halves))
        y = (_stored if store else _recomputed)(halves, x1, x2, arithmetic, hidden)
        given.settle()
        return (*y, [*hidden, y]) if return_hidden else y

    before = registry.C.Environment.now() if undecided else None
    try:
        return run(exact, undecided)
    except Narrow:
        before.restore()
        return run(True, False)


def _pairs(blocks: object) -> list[tuple[Callable, Callable]]:
    if not isinstance(blocks, Sequence | nn.ModuleList) or len(blocks) == 0:
        raise TypeError(f"blocks is {_short(blocks)}; it must be a sequence of at least one pair (f, g)")
    for i, pair in enumerate(blocks):
        if not isinstance(pair, Sequence | nn.ModuleList) or len(pair) != 2 or not all(map(callable, pair)):
            raise TypeError(f"blocks[{i}] is {_short(pair)}; it must be a pair (f, g) of callables")
    return [tuple(pair) for pair in blocks]


def _short(value: object) -> str:
    text = repr(value)
    return f"a {type(value).__name__}" if len(text) > 60 or "\n" in text else text


def _check_streams(x1: object, x2: object) -> None:
    checks.tensor("x1", x1, checks.FLOATS_AND_DOUBLE)
    checks.tensor("x2", x2)
    checks.shape("x2", x2, x1.shape)
    checks.same_dtype("x2", x2, "x1", x1)
    checks.same_device("x2", x2, "x1", x1.device)


def check_mode(exact: object, fraction_bits: object) -> None:
    """What `reversible` can be told of its arithmetic."""
    if not isinstance(exact, bool | str) or exact not in _MODES:
        raise ValueError(f"exact is {exact!r}; it must be 'auto', True, 'int32' or False")
    checks.size("fraction_bits", fraction_bits)
    most = 30 if exact == "int32" else 23
    if fraction_bits > most:
        raise ValueError(f"fraction_bits is {fraction_bits}; with exact={exact!r} it must be at most {most}")


def _resolve(exact: object, x1: Tensor, fraction_bits: object) -> tuple[bool, bool | str]:
    """Whether it is yet to be seen, and what to begin with."""
    check_mode(exact, fraction_bits)
    if exact in (True, "int32") and x1.dtype == torch.float64:
        raise TypeError(f"x1 is torch.float64; with exact={exact!r} it must be torch.float32, bfloat16 or float16")
    if exact != "auto":
        return False, exact
    narrow = registry.compute_dtype(x1) in SIXTEEN_BITS
    return x1.dtype == torch.float32 and not narrow, narrow


def _per_block(name: str, given: object, n_blocks: int) -> list[Mapping]:
    if given is None or isinstance(given, Mapping):
        return [given or {}] * n_blocks
    if not isinstance(given, Sequence) or not all(isinstance(one, Mapping) for one in given):
        raise TypeError(f"{name} is {_short(given)}; it must be a mapping, or a sequence of them")
    if len(given) != n_blocks:
        raise ValueError(f"{name} has {len(given)} mappings; it must have one for each of {n_blocks} blocks")
    return list(given)


# --- the module ---


class ReversibleSequence(nn.Module):
    """Reversible blocks as a module: `seq(x1, x2)` is `reversible(blocks, x1, x2)`.

    The functions are its attributes f0, g0, f1, g1, ...; those that are modules are its submodules, in this order.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Callable, Callable]],
        *,
        exact: bool | str = "auto",
        fraction_bits: int = 16,
        store: bool = False,
    ) -> None:
        super().__init__()
        pairs = _pairs(blocks)
        check_mode(exact, fraction_bits)
        self.n_blocks, self.exact, self.fraction_bits, self.store = len(pairs), exact, fraction_bits, store
        for i, pair in enumerate(pairs):
            for letter, function in zip("fg", pair):
                setattr(self, f"{letter}{i}", function)

    def blocks(self) -> list[tuple[Callable, Callable]]:
        """As they are now: adapters, compilers and wrappers may have replaced some."""
        return [(getattr(self, f"f{i}"), getattr(self, f"g{i}")) for i in range(self.n_blocks)]

    def forward(self, x1: Tensor, x2: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """As `reversible`, with its return_hidden, f_kwargs and g_kwargs, and whatever F and G take."""
        modes = {"exact": self.exact, "fraction_bits": self.fraction_bits, "store": self.store}
        return reversible(self.blocks(), x1, x2, *args, **modes, **kwargs)

    def extra_repr(self) -> str:
        return f"exact={self.exact!r}, fraction_bits={self.fraction_bits}, store={self.store}"
