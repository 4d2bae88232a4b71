r"""Reversible blocks: the backward recomputes what it needs, so that depth costs no memory.

    y1 = x1 + F(x2)        x2 = y2 - G(y1)
    y2 = x2 + G(y1)        x1 = y1 - F(x2)

The backward of a block calls G once more on y1 and F on x2, with gradients, and subtracts. In
floating point x + f - f is not x: bf16 streams are off by a few percent after 48 blocks.

With `exact` they are not off at all. Streams and summands are then multiples of 2^-k, whose sums
are exact as long as they fit. So every gradient is bit for bit that of a network which keeps its
activations (`store=True`). The gradient of the rounding is taken to be 1.

The engine is C++ (csrc/reversible/tape.cpp). It replays calls as described in
csrc/reversible/replay.h and reversible_calls.py; the arithmetic is csrc/cpu/reversible/step.cpp.
State lives in the graph of one run, never on a module. `pyfast/reference/_reversible.py` is the
specification.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyfast._support import checks, dtypes, extension
from pyfast.ops.reversible_arithmetic import StreamArithmetic, function_name
from pyfast.ops.reversible_calls import (
    SIXTEEN_BITS,
    BlockFunction,
    SixteenBitOutput,
    WatchedTensors,
)
from pyfast.ops.reversible_recompute import run_recomputed
from pyfast.ops.reversible_stored import run_stored

_MODES = ("auto", True, "int32", False)


# Disabled with all that it calls: a replay runs outside of what is compiled around the forward.
@torch.compiler.disable
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
    """Run reversible blocks: y1 = x1 + F(x2), y2 = x2 + G(y1), block after block.

    The backward needs the memory of one block.

    F and G are called as they are, hooks and all, once in the forward and once in the backward.
    Both calls see the same random numbers (of torch's own generators) and the same autocast. They
    must then do the same. It is checked that parameters, arguments and tensors captured by a
    function are unchanged, and that F and G are in the same mode (train or eval). What else they
    depend on is not checked. What F changes, such as running statistics, it changes twice. Threads
    share torch's generators: where several threads draw from them at once, no call can be replayed.

    An F that makes a choice which the replay must repeat has an attribute `keeps = True`. It gets a
    dict `kept`, empty in the forward. The replay gets the dict as F left it.

    Gradients reach whatever F and G read: parameters, captured tensors, arguments of any structure.
    This holds under FSDP2's fully_shard too, of the whole or of modules in it.

    Args:
        blocks: [(f, g), ...]; modules or other callables that map a tensor to one of its shape.
        x1: Tensor of any shape; float32, bfloat16, float16 or float64.
        x2: Tensor like x1; the other stream. It may be x1 itself.
        *args: passed to every F and G, after the stream.
        exact: True, "int32", False or "auto" (the default); the arithmetic of the streams, below.
        fraction_bits: int, 0 to 23, with "int32" up to 30; 16 by default.
        store: bool, False by default; keep activations, as torch does. For comparison, short
            sequences and second derivatives. The results have the same bits.
        return_hidden: bool, False by default; return the streams after each block too. They are
            kept in memory.
        f_kwargs: a mapping for every F alone, or a sequence with one mapping for each block.
        g_kwargs: a mapping for every G alone, or a sequence with one mapping for each block.
        **kwargs: passed to every F and G.

    The values of `exact`:
        True: streams are float32 multiples of 2^-fraction_bits. Their absolute values must be below
            2^(24 - fraction_bits), 256 by default. Where nothing requires gradients this is not
            checked: results have the same bits below the bound, are rounded as usual beyond it,
            and NaN and inf pass.
        "int32": streams are in fixed point, below 2^(31 - fraction_bits), 32768 by default. This is
            always checked: without gradients a GPU is waited for.
        False: streams have the dtype of x1 and sums are rounded. Nothing is checked.
        "auto": True if x1, autocast or the output of an F or G has 16 bits, else False. The first
            16-bit output from 32-bit streams starts the forward again; exact=True saves that.

    Returns:
        (y1, y2), or with return_hidden (y1, y2, [(h1, h2), ...]), all in the dtype of x1.

    Raises:
        OverflowError: an exact stream left its range. Raised in the forward, but on a GPU, if
            gradients are computed, at the end of the backward: the forward does not wait.
        FloatingPointError: an exact stream is not finite; raised at the same times.
        RuntimeError: F, G or what they depend on has changed since the forward.

    Example:
        >>> import torch, pyfast
        >>> blocks = [(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(3)]
        >>> x = torch.randn(2, 5, 8, requires_grad=True)
        >>> y1, y2 = pyfast.reversible(blocks, x, x)
        >>> (y1 + y2).sum().backward()
        >>> x.grad.shape
        torch.Size([2, 5, 8])
    """
    pairs = list_pairs(blocks)
    _check_streams(x1, x2)
    is_undecided, first_mode = _resolve_mode(exact, x1, fraction_bits)
    f_options = _options_per_block("f_kwargs", f_kwargs, len(pairs))
    g_options = _options_per_block("g_kwargs", g_kwargs, len(pairs))

    def run(mode: bool | str, refuse_sixteen_bits: bool) -> tuple[Tensor, ...]:
        watched = WatchedTensors(pairs, (args, kwargs, f_options, g_options))
        calls = []
        for i, pair in enumerate(pairs):
            functions = []
            for j, options in enumerate((f_options[i], g_options[i])):
                name, arguments = function_name(i, j), {**kwargs, **options}
                functions.append(
                    BlockFunction(name, pair[j], args, arguments, refuse_sixteen_bits, watched)
                )
            calls.append(tuple(functions))
        hidden = [] if return_hidden else None
        arithmetic = StreamArithmetic(mode, fraction_bits, x1, len(calls))
        run_blocks = run_stored if store else run_recomputed
        y = run_blocks(calls, x1, x2, arithmetic, hidden)
        watched.drop_changed()
        return (*y, [*hidden, y]) if return_hidden else y

    environment = extension.C.Environment.now() if is_undecided else None
    try:
        return run(first_mode, refuse_sixteen_bits=is_undecided)
    except SixteenBitOutput:
        environment.restore()
        return run(True, refuse_sixteen_bits=False)


def list_pairs(blocks: object) -> list[tuple[Callable, Callable]]:
    """Return the blocks as a list of pairs (f, g), after checking that they are."""
    if not isinstance(blocks, Sequence | nn.ModuleList) or len(blocks) == 0:
        raise TypeError(
            f"blocks is {_describe(blocks)}; it must be a sequence of at least one pair (f, g)"
        )
    for i, pair in enumerate(blocks):
        is_pair = isinstance(pair, Sequence | nn.ModuleList) and len(pair) == 2
        if not is_pair or not all(map(callable, pair)):
            raise TypeError(
                f"blocks[{i}] is {_describe(pair)}; it must be a pair (f, g) of callables"
            )
    return [tuple(pair) for pair in blocks]


def _describe(value: object) -> str:
    text = repr(value)
    return f"a {type(value).__name__}" if len(text) > 60 or "\n" in text else text


def _check_streams(x1: object, x2: object) -> None:
    checks.tensor("x1", x1, checks.FLOATS_AND_DOUBLE)
    checks.tensor("x2", x2)
    checks.shape("x2", x2, x1.shape)
    checks.same_dtype("x2", x2, "x1", x1)
    checks.same_device("x2", x2, "x1", x1.device)


def check_mode(exact: object, fraction_bits: object) -> None:
    """Check the arithmetic that `reversible` is asked for."""
    if not isinstance(exact, bool | str) or exact not in _MODES:
        raise ValueError(f"exact is {exact!r}; it must be 'auto', True, 'int32' or False")
    checks.size("fraction_bits", fraction_bits)
    limit = 30 if exact == "int32" else 23
    if fraction_bits > limit:
        raise ValueError(
            f"fraction_bits is {fraction_bits}; with exact={exact!r} it must be at most {limit}"
        )


def _resolve_mode(exact: object, x1: Tensor, fraction_bits: object) -> tuple[bool, bool | str]:
    """Return whether a 16-bit output may still change the mode, and the mode to begin with."""
    check_mode(exact, fraction_bits)
    if exact in (True, "int32") and x1.dtype == torch.float64:
        raise TypeError(
            f"x1 is torch.float64; with exact={exact!r} it must be "
            "torch.float32, bfloat16 or float16"
        )
    if exact != "auto":
        return False, exact
    has_sixteen_bits = dtypes.compute_dtype(x1) in SIXTEEN_BITS
    return x1.dtype == torch.float32 and not has_sixteen_bits, has_sixteen_bits


def _options_per_block(name: str, options: object, n_blocks: int) -> list[Mapping]:
    if options is None or isinstance(options, Mapping):
        return [options or {}] * n_blocks
    if not isinstance(options, Sequence) or not all(isinstance(one, Mapping) for one in options):
        raise TypeError(
            f"{name} is {_describe(options)}; it must be a mapping, or a sequence of them"
        )
    if len(options) != n_blocks:
        raise ValueError(
            f"{name} has {len(options)} mappings; it must have one for each of {n_blocks} blocks"
        )
    return list(options)
