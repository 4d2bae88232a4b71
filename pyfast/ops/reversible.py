r"""Reversible blocks: what a backward needs is computed again from the outputs, so that depth costs
no memory.

    y1 = x1 + F(x2)        x2 = y2 - G(y1)
    y2 = x2 + G(y1)        x1 = y1 - F(x2)

The backward of a block calls G once more on y1 and F on x2, with gradients, and subtracts. In
floating point x + f - f is not x: bf16 streams are off by a few percent after 48 blocks. With
`exact` they are not: streams and summands are multiples of 2^-k, whose sums are exact as long as
they fit, so that every gradient is, bit for bit, that of a network which keeps its activations
(`store=True`). Rounding is a straight line to the gradient.

The engine is C++ (csrc/reversible/tape.cpp; what it knows of a call: csrc/reversible/replay.h and
reversible_call.py; arithmetic: csrc/cpu/reversible/step.cpp). State lives in the graph of one run,
never on a module. `pyfast/reference/_reversible.py` is the specification.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyfast._support import checks, dtypes, extension
from pyfast.ops.reversible_arithmetic import _Arithmetic, _name
from pyfast.ops.reversible_calls import SIXTEEN_BITS, Given, Half, Narrow
from pyfast.ops.reversible_recompute import _recomputed
from pyfast.ops.reversible_stored import _stored

_MODES = ("auto", True, "int32", False)

# --- the op: CPU kernel in csrc/cpu/reversible/step.cpp, GPU kernel in csrc/cuda/reversible.cu ---


# --- arithmetic: what a stream is, and what may go wrong ---


# --- the graph of a run: it carries no data but gradients; the streams are on the tape ---


# --- the same with stored activations ---


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
    """y1 = x1 + F(x2), y2 = x2 + G(y1), block after block; the memory of a backward is that of one
    block.

    F and G are called as they are, hooks and all, once in the forward and once in the backward,
    with the same random numbers (of torch's own generators) and autocast. They must then do the
    same. That parameters, arguments and tensors captured by a function are unchanged, and the modes
    (train or eval) of F and G, is checked; what else they depend on is not. An F with a choice to
    hand on has an attribute `keeps = True`, and gets a dict `kept`, empty at first, that comes back
    as F left it. Gradients reach whatever F and G read: parameters, captured tensors, arguments of
    any structure; under FSDP2's fully_shard too, of the whole or of modules in it. What F changes,
    such as running statistics, it changes twice. Threads share torch's generators: where several
    draw from them at once, none can be replayed.

    Args:
        blocks: [(f, g), ...], modules or other callables of a tensor that return one of its shape.
        x1: float32, bfloat16, float16 or float64. x2: the other stream, like x1; it may be x1.
        *args: for every F and G, after the stream, as are **kwargs. exact: True: streams are
        float32 multiples of 2^-fraction_bits below 2^(24 - fraction_bits), 256. Beyond, or if
            a value is not finite, OverflowError or FloatingPointError: in the forward, or if
            gradients are computed on a GPU, which is not waited for, at the end of the backward.
            Where nothing requires gradients neither is checked: the same bits below, floats as ever
            beyond, NaN and inf pass. "int32": in fixed point, below 2^(31 - fraction_bits), 32768,
            always checked: without gradients a GPU is waited for. False: streams are what x1 is and
            sums are rounded; nothing is checked. "auto": True if x1, autocast or what an F or G
            returns has 16 bits, else False. A first 16-bit result from 32-bit streams starts the
            forward again: say True to save that.
        fraction_bits: 0 to 23, with "int32" to 30. store: keep activations, as torch does: for
        comparison, short sequences, second derivatives. The same bits. return_hidden: also the
        streams after each block. They are kept: it costs what it says. f_kwargs: for every F alone;
        or a sequence, of one mapping a block. g_kwargs: for every G alone, likewise.

    Returns:
        (y1, y2), or with return_hidden (y1, y2, [(h1, h2), ...]), all in the dtype of x1.
    """
    functions = list_pairs(blocks)
    _check_streams(x1, x2)
    undecided, exact = _resolve(exact, x1, fraction_bits)
    per_block = (
        _per_block("f_kwargs", f_kwargs, len(functions)),
        _per_block("g_kwargs", g_kwargs, len(functions)),
    )

    def run(exact: bool | str, wide: bool) -> tuple[Tensor, ...]:
        given = Given(functions, (args, kwargs, per_block))
        halves = [
            tuple(
                Half(_name(i, j), pair[j], args, {**kwargs, **per_block[j][i]}, wide, given)
                for j in (0, 1)
            )
            for i, pair in enumerate(functions)
        ]
        hidden = [] if return_hidden else None
        arithmetic = _Arithmetic(exact, fraction_bits, x1, len(halves))
        y = (_stored if store else _recomputed)(halves, x1, x2, arithmetic, hidden)
        given.settle()
        return (*y, [*hidden, y]) if return_hidden else y

    before = extension.C.Environment.now() if undecided else None
    try:
        return run(exact, undecided)
    except Narrow:
        before.restore()
        return run(True, False)


def list_pairs(blocks: object) -> list[tuple[Callable, Callable]]:
    if not isinstance(blocks, Sequence | nn.ModuleList) or len(blocks) == 0:
        raise TypeError(
            f"blocks is {_short(blocks)}; it must be a sequence of at least one pair (f, g)"
        )
    for i, pair in enumerate(blocks):
        if (
            not isinstance(pair, Sequence | nn.ModuleList)
            or len(pair) != 2
            or not all(map(callable, pair))
        ):
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
        raise ValueError(
            f"fraction_bits is {fraction_bits}; with exact={exact!r} it must be at most {most}"
        )


def _resolve(exact: object, x1: Tensor, fraction_bits: object) -> tuple[bool, bool | str]:
    """Whether it is yet to be seen, and what to begin with."""
    check_mode(exact, fraction_bits)
    if exact in (True, "int32") and x1.dtype == torch.float64:
        raise TypeError(
            f"x1 is torch.float64; with exact={exact!r} it must be torch.float32, bfloat16 or float16"
        )
    if exact != "auto":
        return False, exact
    narrow = dtypes.compute_dtype(x1) in SIXTEEN_BITS
    return x1.dtype == torch.float32 and not narrow, narrow


def _per_block(name: str, given: object, n_blocks: int) -> list[Mapping]:
    if given is None or isinstance(given, Mapping):
        return [given or {}] * n_blocks
    if not isinstance(given, Sequence) or not all(isinstance(one, Mapping) for one in given):
        raise TypeError(f"{name} is {_short(given)}; it must be a mapping, or a sequence of them")
    if len(given) != n_blocks:
        raise ValueError(
            f"{name} has {len(given)} mappings; it must have one for each of {n_blocks} blocks"
        )
    return list(given)


# --- the module ---
