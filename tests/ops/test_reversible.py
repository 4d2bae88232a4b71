"""Reversible blocks: values, exactness, memory, cost."""

import math

import pytest
import torch
from helpers.reversible_nets import (
    Mlp,
    assert_close,
    assert_same,
    loss_of,
    sequence,
    step,
    stored,
    streams,
)
from torch import nn

import pyfast
from pyfast import reference
from pyfast._support.measure import peak_bytes

EXACT = [True, "int32"]
COMPUTE = {
    "autocast": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "f32": (torch.float32, False),
}


# --- the arithmetic ---


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "plain bf16", "plain f16", "grid", "fixed"])
def test_a_step_is_the_reference_to_the_bit(kind, out_dtype, subtract, device):
    for shape in ((0,), (3, 5), (67, 131)):
        stream = {"plain bf16": torch.bfloat16, "plain f16": torch.float16}.get(kind, torch.float32)
        stream = torch.randn(shape, device=device).to(stream)
        stream = (stream * 65536).round() / 65536 if kind == "grid" else stream
        stream = (stream * 65536).int() if kind == "fixed" else stream
        out, bits = (
            torch.randn(shape, device=device).mul(3).to(out_dtype),
            -1 if kind.startswith("plain") else 16,
        )
        results = []
        for run in (torch.ops.pyfast.reversible_step, reference.reversible_step_op):
            changed = stream.clone(), torch.zeros(1, dtype=torch.int32, device=device)
            run(
                changed[0],
                out.T.contiguous().T if out.dim() == 2 else out,
                subtract,
                bits,
                changed[1],
            )
            results.append(changed)
        assert_same(*results)
        assert results[0][1] == 0


def test_halves_are_rounded_to_even_and_sums_are_undone():
    flag = torch.zeros(1, dtype=torch.int32)
    out = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e-9]) / 65536
    for dtype in (torch.float32, torch.int32):
        stream = torch.zeros(6, dtype=dtype)
        torch.ops.pyfast.reversible_step(stream, out, False, 16, flag)
        assert (stream if dtype == torch.int32 else stream * 65536).tolist() == [0, 2, 2, 0, -2, 0]
        torch.ops.pyfast.reversible_step(stream, out, True, 16, flag)
        assert stream.count_nonzero() == 0


@pytest.mark.parametrize(
    "run", [torch.ops.pyfast.reversible_step, reference.reversible_step_op], ids=["op", "reference"]
)
@pytest.mark.parametrize(
    "dtype, start, out, expected",
    [
        (torch.float32, 255.0, 0.99, 0),
        (torch.float32, 255.0, 1.0, 1),
        (torch.float32, -255.0, -1.0, 1),
        (torch.float32, 0.0, math.nan, 2),
        (torch.float32, 0.0, -math.inf, 2),
        (torch.int32, 2**31 - 65536, 0.99, 0),
        (torch.int32, 2**31 - 65536, 1.0, 1),
        (torch.int32, -(2**31), -1.0, 1),
        (torch.int32, 0, 40000.0, 1),
        (torch.int32, 0, math.nan, 2),
        (torch.int32, 0, math.inf, 2),
    ],
)
def test_a_step_says_what_went_wrong(run, dtype, start, out, expected):
    stream = torch.zeros(3000, dtype=dtype)
    stream[2345], flag = start, torch.zeros(1, dtype=torch.int32)
    run(stream, torch.zeros(3000).index_fill(0, torch.tensor(2345), out), False, 16, flag)
    assert flag == expected


def test_a_sum_that_wrapped_around_is_undone():
    stream, flag = torch.full((9,), 2**31 - 5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for value in (3e4, -5e4, 1e9, math.inf, math.nan):
        before, out = stream.clone(), torch.full((9,), value)
        torch.ops.pyfast.reversible_step(stream, out, False, 16, flag)
        torch.ops.pyfast.reversible_step(stream, out, True, 16, flag)
        assert torch.equal(stream, before)


# --- values ---


@pytest.mark.parametrize("exact", [False, *EXACT])
def test_values_and_gradients_are_the_definition_s(exact):
    seq, x = sequence(3, exact=exact), streams()
    y1, y2, hidden = reference.reversible(seq.blocks(), *x, exact=exact, return_hidden=True)
    wanted = [y1, y2, *torch.autograd.grad(loss_of(y1, y2), [*x, *seq.parameters()])]
    assert_close(step(seq, *x), wanted)
    assert_close(stored(seq, *x), wanted)
    assert_close(pyfast.reversible(seq.blocks(), *x, exact=exact), wanted[:2])
    with torch.no_grad():
        *y, found = seq(*x, return_hidden=True)
    assert not any(t.requires_grad for t in y)
    assert_close([*y, *sum(found, ())], [y1, y2, *sum(hidden, ())])


def test_gradcheck():
    seq, x = (
        sequence(2, 3).double(),
        [torch.randn(1, 2, 3).double().requires_grad_() for _ in range(2)],
    )
    assert torch.autograd.gradcheck(seq, x)
    parameters = list(seq.parameters())
    assert torch.autograd.gradcheck(lambda *_: seq(*x), parameters)


def recovered(seq, *args, **kwargs):
    """Run a step. Return its results, and the inputs of each F and G in forward and replay."""
    given = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args: given.setdefault(m, []).append(args[0].detach().clone())
        )
        for m in seq.children()
    ]
    found = step(seq, *args, **kwargs)
    for hook in hooks:
        hook.remove()
    return found, given.values()


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (1, 0, 2)])
def test_exact_is_exact_for_streams_laid_out_differently(order):
    """Gradients of biases are sums over tokens, whose order follows the memory layout."""
    seq = pyfast.ReversibleSequence(
        [(nn.Linear(24, 24), nn.Linear(24, 24)) for _ in range(3)], exact=True
    )
    x1, x2 = (torch.randn(3, 17, 24) for _ in range(2))
    back = [order.index(i) for i in range(3)]
    x1, x2 = x1.permute(order).contiguous().permute(back).requires_grad_(), x2.requires_grad_()
    for x in ((x1, x2), (x2, x1), (x1, x1)):
        assert_same(step(seq, *x), stored(seq, *x))


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("compute", COMPUTE)
def test_exact_is_exact(compute, exact):
    dtype, autocast = COMPUTE[compute]
    seq, x = sequence(48, dropout=0.1, exact=exact).to(dtype), streams(dtype=dtype)
    found, given = recovered(seq, *x, autocast=autocast)
    assert all(torch.equal(*pair) for pair in given) and len(given) == 96
    assert found[0].dtype == dtype
    assert_same(found, stored(seq, *x, autocast=autocast))


def test_exact_is_exact_on_a_device(device):
    blocks = [(Mlp(8, 0.1), Mlp(8, 0.1)) for _ in range(12)]
    for exact in EXACT:
        seq, x = pyfast.ReversibleSequence(blocks, exact=exact).to(device), streams(device=device)
        assert_same(step(seq, *x, autocast=True), stored(seq, *x, autocast=True))
        with pytest.raises(FloatingPointError, match="x2 has a value that is not finite"):
            sum(seq(x[0], x[1] * math.nan)).sum().backward()


def test_what_is_not_exact_is_not():
    """This shows that the tests above can fail."""
    seq, x = sequence(48, dropout=0.1, exact=False).bfloat16(), streams(dtype=torch.bfloat16)
    found, given = recovered(seq, *x)
    assert not all(torch.equal(*pair) for pair in given)
    assert not torch.equal(found[2], stored(seq, *x)[2])


def test_float32_is_near_without():
    seq, x = sequence(48, dropout=0.1, exact=False), streams()
    assert_close(step(seq, *x), stored(seq, *x), 1e-5)


def test_auto():
    def narrow(x):
        return x.bfloat16().sin()

    for f, dtype, autocast, expected in (
        (torch.sin, torch.float32, False, False),
        (torch.sin, torch.float64, False, False),
        (torch.sin, torch.bfloat16, False, True),
        (torch.sin, torch.float32, True, True),
        (narrow, torch.float32, False, True),
    ):
        x = [torch.randn(3, 4, dtype=dtype) for _ in range(2)]
        blocks = [(torch.cos, torch.cos), (f, f)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            auto, chosen, other = (
                pyfast.reversible(blocks, *x, exact=e)
                for e in ("auto", expected, not expected and dtype != torch.float64)
            )
        assert_same(auto, chosen)
        assert dtype != torch.float32 or not torch.equal(auto[0], other[0])


def test_auto_starts_again_with_the_same_random_numbers():
    seq = pyfast.ReversibleSequence([(nn.Dropout(), lambda x: (torch.rand_like(x) * x).bfloat16())])
    x = streams()
    found = step(seq, *x)
    seq.exact = True
    assert_same(step(seq, *x), found)


# --- what goes wrong with the numbers ---


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("exact, bound", [(True, 256), ("int32", 32768)])
def test_overflow_is_an_error_that_names_the_cure(exact, bound, store):
    def grows(x):
        return x * 0 + bound / 2

    x = [torch.ones(3, requires_grad=True)] * 2
    blocks = [(torch.sin, grows), (torch.sin, torch.sin), (torch.sin, grows)]
    with pytest.raises(
        OverflowError,
        match=rf"with blocks\[2\]\[1\] \(G\) a stream reached {bound}, the end of exact",
    ):
        pyfast.reversible(blocks, *x, exact=exact, store=store)
    pyfast.reversible(blocks, *x, exact=exact, store=store, fraction_bits=14)  # the cure
    with pytest.raises(OverflowError, match="with x2 a stream reached"):
        pyfast.reversible(blocks, x[0], x[1] * 1e9, exact=exact)


@pytest.mark.parametrize("exact", EXACT)
def test_nan_is_an_error_with_exact(exact):
    with pytest.raises(
        FloatingPointError,
        match=r"blocks\[1\]\[0\] \(F\) has a value that is not finite; .*exact=False",
    ):
        pyfast.reversible(
            [(torch.sin, torch.sin), (lambda x: x * math.nan, torch.sin)], *streams(), exact=exact
        )
    with pytest.raises(FloatingPointError, match="x1 has a value that is not finite"):
        pyfast.reversible(
            [(torch.sin, torch.sin)],
            torch.tensor(math.inf, requires_grad=True),
            torch.tensor(1.0),
            exact=exact,
        )


@pytest.mark.parametrize("store", [False, True])
def test_without_gradients_nothing_is_checked_but_integers(store, device):
    seq, x = sequence(3, exact=True, store=store).to(device), streams(device=device)
    wanted = seq(*x)
    with torch.no_grad():
        assert_same(seq(*x), wanted)
        big = [t * 1e4 for t in x]
        wanted = seq(*big)
        assert_close(wanted, pyfast.reversible(seq.blocks(), *big, exact=False), 1e-5)
        assert all(
            y.isnan().any()
            for y in seq(x[0], x[1].index_fill(0, torch.tensor(1, device=device), math.nan))
        )
        with pytest.raises(OverflowError, match="with x1 a stream reached 32768"):
            pyfast.reversible(seq.blocks(), *(t * 1e4 for t in big), exact="int32", store=store)
    seq.requires_grad_(False)
    assert_same(seq(*big), wanted)
    with pytest.raises(OverflowError, match="with x1 a stream reached 256"):
        sum(seq(big[0].requires_grad_(), big[1])).sum().backward()


def test_nan_passes_without():
    x = streams()
    y = pyfast.reversible([(lambda x: x * math.nan, torch.sin)], *x)
    assert all(t.isnan().all() for t in (*y, *torch.autograd.grad(sum(y).sum(), x)))


# --- cost ---


def test_one_recomputation():
    seq, x = pyfast.ReversibleSequence([(Mlp(8), Mlp(8)) for _ in range(5)]), streams()
    sum(seq(*x)).sum().backward()
    assert [m.calls for m in seq.children()] == [2] * 10


def peak_of_a_step(depth: int, **options) -> int:
    """Return the peak memory of a step, beyond parameters and their gradients."""
    seq = pyfast.ReversibleSequence([(Mlp(32, 0.1), Mlp(32)) for _ in range(depth)], **options)
    x = [torch.randn(4096, 32, requires_grad=True) for _ in range(2)]
    for t in (*seq.parameters(), *x):
        t.grad = torch.zeros_like(t)
    return peak_bytes(lambda: sum(seq(*x)).sum().backward())


@pytest.mark.parametrize("exact", [False, True])
def test_memory_does_not_grow_with_depth(exact):
    shallow, deep = (peak_of_a_step(depth, exact=exact) for depth in (6, 48))
    assert deep <= 1.05 * shallow < peak_of_a_step(6, exact=exact, store=True), (shallow, deep)


def test_streams_are_changed_in_place():
    """The peak is two streams and F's result. The backward adds two gradients and what F needs."""
    x = [torch.randn(1 << 18, requires_grad=True) for _ in range(2)]
    blocks = [(torch.neg, torch.neg)] * 4
    nbytes = x[0].nbytes
    with torch.no_grad():
        forward = peak_bytes(lambda: pyfast.reversible(blocks, *x, exact=True))
    assert forward < 3.1 * nbytes
    y = sum(pyfast.reversible(blocks, *x, exact=True)).sum()
    assert peak_bytes(lambda: torch.autograd.grad(y, x)) < 6.1 * nbytes
