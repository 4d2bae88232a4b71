"""Wrong calls of reversible blocks: errors name the argument, its value and the rule."""

import pytest
import torch
from helpers.reversible_nets import Mlp, assert_same, loss_of, sequence, step, streams
from torch import nn

import pyfast

X = torch.randn(3, 4)
SIN = [(torch.sin, torch.sin)]


def with_f(f):
    return lambda: pyfast.reversible([(torch.sin, torch.sin), (f, torch.sin)], X, X)


def keeps_a_gradient(x, kept):
    kept["value"] = x * 2
    return x


keeps_a_gradient.keeps = True
F = r"blocks\[1\]\[0\] \(F\)"

BAD = {
    "x1 not a tensor": (
        lambda: pyfast.reversible(SIN, [1.0], X),
        TypeError,
        "x1 must be a torch.Tensor, not list",
    ),
    "x1 of ints": (
        lambda: pyfast.reversible(SIN, X.int(), X),
        TypeError,
        "x1 is torch.int32; it must be torch.float32",
    ),
    "x2 not a tensor": (
        lambda: pyfast.reversible(SIN, X, None),
        TypeError,
        "x2 must be a torch.Tensor, not NoneType",
    ),
    "shapes": (
        lambda: pyfast.reversible(SIN, X, X[:2]),
        ValueError,
        r"x2 has shape \[2, 4\]; it must be \[3, 4\]",
    ),
    "dtypes": (
        lambda: pyfast.reversible(SIN, X, X.half()),
        TypeError,
        "x2 is torch.float16 but x1 is torch.float32; they must be the same",
    ),
    "devices": (
        lambda: pyfast.reversible(SIN, X, X.to("meta")),
        ValueError,
        "x2 is on meta but x1 is on cpu",
    ),
    "no blocks": (
        lambda: pyfast.reversible([], X, X),
        TypeError,
        r"blocks is \[\]; it must be a sequence of at least",
    ),
    "blocks a module": (
        lambda: pyfast.ReversibleSequence(nn.Linear(2, 2)),
        TypeError,
        "blocks is .*Linear.*; it must be a sequence",
    ),
    "not pairs": (
        lambda: pyfast.reversible([torch.sin], X, X),
        TypeError,
        r"blocks\[0\] is .*; it must be a pair",
    ),
    "triples": (
        lambda: pyfast.reversible([(torch.sin,) * 3], X, X),
        TypeError,
        r"blocks\[0\] is .*must be a pair",
    ),
    "not callable": (
        lambda: pyfast.ReversibleSequence([(torch.sin, 3)]),
        TypeError,
        r"blocks\[0\] is .*of callables",
    ),
    "exact": (
        lambda: pyfast.reversible(SIN, X, X, exact="yes"),
        ValueError,
        "exact is 'yes'; it must be 'auto', True, 'int32' or False",
    ),
    "exact of a module": (
        lambda: pyfast.ReversibleSequence(SIN, exact=None),
        ValueError,
        "exact is None; it must be",
    ),
    "exact doubles": (
        lambda: pyfast.reversible(SIN, X.double(), X.double(), exact=True),
        TypeError,
        "x1 is torch.float64; with exact=True it must be torch.float32",
    ),
    "bits a float": (
        lambda: pyfast.reversible(SIN, X, X, fraction_bits=1.5),
        ValueError,
        "fraction_bits is 1.5; it must",
    ),
    "bits": (
        lambda: pyfast.reversible(SIN, X, X, exact=True, fraction_bits=24),
        ValueError,
        "fraction_bits is 24; with exact=True it must be at most 23",
    ),
    "f_kwargs": (
        lambda: pyfast.reversible(SIN, X, X, f_kwargs=3),
        TypeError,
        "f_kwargs is 3; it must be a mapping",
    ),
    "g_kwargs too many": (
        lambda: pyfast.reversible(SIN, X, X, g_kwargs=[{}, {}]),
        ValueError,
        "g_kwargs has 2 mappings; it must have one for each of 1 blocks",
    ),
    "a block that cuts": (
        with_f(lambda x: x[:2]),
        ValueError,
        rf"{F} returned .*\[2, 4\] on cpu; it must .*\[3, 4\]",
    ),
    "one that broadcasts": (
        with_f(lambda x: x[:1]),
        ValueError,
        rf"{F} returned .*\[1, 4\] on cpu; it must",
    ),
    "one that moves": (
        with_f(lambda x: x.to("meta")),
        ValueError,
        rf"{F} returned .* on meta; it must return",
    ),
    "one of ints": (
        with_f(lambda x: x.int()),
        ValueError,
        rf"{F} returned torch.int32 .*; it must return floats",
    ),
    "one of doubles": (
        with_f(lambda x: x.double()),
        ValueError,
        rf"{F} returned torch.float64 .*; it must return floats",
    ),
    "one of 8 bits": (
        with_f(lambda x: x.to(torch.float8_e4m3fn)),
        ValueError,
        rf"{F} returned torch.float8_e4m3fn",
    ),
    "one that is sparse": (
        with_f(lambda x: x.to_sparse()),
        ValueError,
        rf"{F} returned .*sparse_coo",
    ),
    "one of a tuple": (
        with_f(lambda x: (x, x)),
        TypeError,
        rf"{F} returned a tuple; it must return a torch.Tensor",
    ),
    "one of nothing": (
        with_f(lambda x: None),
        TypeError,
        rf"{F} returned a NoneType; it must return",
    ),
    "one in place": (
        with_f(lambda x: x.mul_(2)),
        ValueError,
        rf"{F} changed its input in place; it must not",
    ),
    "kept gradients": (
        lambda: pyfast.reversible([(keeps_a_gradient, torch.sin)], X, X.clone().requires_grad_()),
        ValueError,
        r"blocks\[0\]\[0\] \(F\) kept 'value', which requires gradients; it must be detached",
    ),
}


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("call, kind, message", BAD.values(), ids=BAD.keys())
def test_bad_input(call, kind, message, store, monkeypatch):
    monkeypatch.setitem(pyfast.reversible.__wrapped__.__kwdefaults__, "store", store)
    with pytest.raises(kind, match=message):
        call()


def test_the_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        seq = pyfast.ReversibleSequence(SIN, exact=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seq(X, X)[0].dtype == torch.float32


def test_a_relu_in_place_is_torch_s_error_or_ours():
    x = X.clone().requires_grad_()
    with pytest.raises(
        RuntimeError,
        match="leaf Variable that requires grad is being used in an in-place operation",
    ):
        pyfast.reversible([(nn.ReLU(inplace=True), torch.sin)], x, x)


def test_second_derivatives_need_store():
    seq, x = pyfast.ReversibleSequence([(Mlp(8), Mlp(8))] * 2), streams()
    with pytest.raises(RuntimeError, match="create_graph=True does not work .* store=True"):
        torch.autograd.grad(loss_of(*seq(*x)), x, create_graph=True)
    seq.store = True
    (d,) = torch.autograd.grad(loss_of(*seq(*x)), x[:1], create_graph=True)
    assert torch.autograd.grad(d.sum(), x[0])[0].count_nonzero()


def test_forward_mode_and_functorch_are_refused():
    x = streams(grad=False)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward mode"),
    ):
        pyfast.reversible(
            [(torch.sin, torch.sin)], torch.autograd.forward_ad.make_dual(x[0], x[1]), x[1]
        )
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: sum(pyfast.reversible([(torch.sin, torch.sin)], x, x)).sum())(
            x[0]
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_an_exception_in_the_replay_leaves_all_as_it_was(autocast):
    seq, x = sequence(3, dropout=0.1, exact=True), streams()
    wanted = step(seq, *x, autocast=autocast)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(*seq(*x))
    state, wants = torch.get_rng_state(), [*x, *seq.parameters()]
    hook = seq.f1.register_forward_pre_hook(lambda *_: torch.rand(3) @ torch.rand(4))
    with pytest.raises(
        RuntimeError, match=r"blocks\[1\]\[0\] \(F\) raised in the replay .*size"
    ) as caught:
        torch.autograd.grad(loss, wants, retain_graph=True)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    hook.remove()
    assert_same(torch.autograd.grad(loss, wants), wanted[2:])


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_no_memory_in_the_replay_is_told_as_such(kind):
    def f(x):
        if calls:
            raise kind("of this much")
        calls.append(1)
        return x.sin()

    calls = []
    y = pyfast.reversible([(f, torch.sin)], *streams())
    with pytest.raises(kind, match="of this much"):
        sum(y).sum().backward()


def test_an_exception_in_the_gradients_of_a_replay_keeps_its_type():
    def refuse(grad):
        raise KeyError("mine")

    def f(x):
        y = x.sin()
        y.register_hook(refuse)
        return y

    y = pyfast.reversible([(f, torch.sin)], *streams())
    with pytest.raises(KeyError, match="mine"):
        sum(y).sum().backward()


def test_an_exception_in_the_forward_is_the_function_s():
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pyfast.reversible([(f, f)], *streams())


STEP = torch.ops.pyfast.reversible_step
FLAG = torch.zeros(1, dtype=torch.int32)
RAW = {
    "out cut": lambda: STEP(X.clone(), X[:2], False, 16, FLAG),
    "out elsewhere": lambda: STEP(X.clone(), X.to("meta"), False, 16, FLAG),
    "out of ints": lambda: STEP(X.clone(), X.int(), False, 16, FLAG),
    "bits": lambda: STEP(X.clone(), X, False, 24, FLAG),
    "bits of none": lambda: STEP(X.int(), X, False, -1, FLAG),
    "a grid of halves": lambda: STEP(X.half(), X, False, 16, FLAG),
    "a stream with gaps": lambda: STEP(torch.zeros(3, 8)[:, ::2], X, False, 16, FLAG),
    "a stream on itself": lambda: STEP(torch.zeros(4).expand(3, 4), X, False, 16, FLAG),
    "flag of floats": lambda: STEP(X.clone(), X, False, 16, FLAG.float()),
    "no flag": lambda: STEP(X.clone(), X, False, 16, FLAG[:0]),
}


@pytest.mark.parametrize("call", RAW.values(), ids=RAW.keys())
def test_bad_raw_op_is_an_exception_not_a_crash(call):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        call()
