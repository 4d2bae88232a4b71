"""lora_linear, lora_linears and multi_lora_linear against their definitions in float64."""

import copy
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerance import DTYPES, assert_as_exact_as_torch, relative_error

import pyfast
from pyfast import reference
from pyfast.ops import dora
from pyfast.ops.dora import RowSquaresCache, dora_norm, row_squares
from pyfast.ops.lora import lora_linear, lora_linears, multi_lora_linear
from pyfast.ops.lora_arguments import Projection

LEAVES = ("x", "weight", "lora_a", "lora_b", "bias", "lora_bias", "magnitude")


def case(device, dtype, *, m=(7,), out=40, into=70, r=4, base="dense", factors=None, **present):
    """Arguments of lora_linear in float64; `present` says which of the optional vectors there are."""
    args = {
        "x": torch.randn(*m, into),
        "weight": torch.randn(out, into) / into**0.5,
        "lora_a": torch.randn(r, into) / into**0.5,
        "lora_b": torch.randn(out, r) / max(r, 1) ** 0.5,
    }
    for name in ("bias", "lora_bias", "magnitude"):
        if present.get(name):
            args[name] = torch.rand(out) + 0.5
    rounded = {
        n: t.to(factors or dtype if n in ("lora_a", "lora_b") else dtype).to(device)
        for n, t in args.items()
    }
    if base == "nf4":
        rounded["weight"] = pyfast.nf4_quantize(args["weight"].to(device))
    return rounded


def leaves_of(args, dtype=None):
    """Copies that want gradients, in a dtype or in their own; a 4-bit weight as it is."""
    return {
        n: t
        if n == "weight" and not torch.is_tensor(t)
        else t.to(dtype or t.dtype, copy=True).requires_grad_()
        for n, t in args.items()
    }


def run(function, args, dy, **options):
    """y and the gradient of every leaf."""
    y = function(**args, **options)
    names = [n for n in LEAVES if torch.is_tensor(args.get(n))]
    return {
        "y": y,
        **dict(zip(names, torch.autograd.grad(y, [args[n] for n in names], dy.to(y.dtype)))),
    }


def check(args, **options):
    """Ours against float64, held to what plain torch in the same dtype errs."""
    x = args["x"]
    dy = torch.randn(*x.shape[:-1], args["lora_b"].shape[0], device=x.device).to(x.dtype)
    ours = run(lora_linear, leaves_of(args), dy, **options)
    exact = run(reference.lora_linear, leaves_of(args, torch.float64), dy, **options)
    plain = run(reference.lora_linear, leaves_of(args, x.dtype), dy, **options)
    for name, value in ours.items():
        assert value.dtype == (x.dtype if name == "y" else args[name].dtype)
        assert_as_exact_as_torch(value, plain[name].to(value.dtype), exact[name])


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [(), (1,), (3, 3), (16,), (33,), (150,), (2, 300)], ids=str)
def test_rows(device, dtype, base, m):
    check(case(device, dtype, m=m, base=base), scaling=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out,into", [(1, 1), (5, 7), (64, 128), (129, 257), (300, 520)])
@pytest.mark.parametrize("m", [4, 37])
def test_sizes(device, dtype, out, into, m):
    check(case(device, dtype, m=(m,), out=out, into=into, bias=True), scaling=0.5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("r", [1, 3, 16, 20, 64, 130])
@pytest.mark.parametrize("m", [2, 50])
def test_ranks(device, base, r, m):
    check(case(device, torch.float32, m=(m,), r=r, base=base), scaling=1.5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "present",
    [("bias",), ("lora_bias",), ("magnitude",), ("bias", "lora_bias", "magnitude")],
    ids="-".join,
)
@pytest.mark.parametrize("m", [5, 40])
def test_options(device, dtype, base, present, m):
    args = case(device, dtype, m=(m,), base=base, **dict.fromkeys(present, True))
    check(args, scaling=0.7, dropout_p=0.25, seed=11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [0.1, 10.0])
@pytest.mark.parametrize("magnitude", [0.0, 0.02, 3.0])
def test_any_magnitude(device, dtype, magnitude, bias):
    """Beside any bias, and of 0: its gradient is of what it multiplies, not of what came out."""
    args = case(device, dtype, m=(30,), bias=True, magnitude=True)
    args["magnitude"][::2] = magnitude
    args["bias"] *= bias
    check(args, scaling=1.0)


def test_the_result_may_be_changed_in_place(device):
    """Adding to the result in place gives the values and gradients of a sum in a new tensor."""
    args = case(device, torch.float32, magnitude=True, bias=True)
    seed, dy = torch.tensor(5, device=device), torch.randn(7, 40, device=device)

    def in_place(**options):
        y = lora_linear(**options)
        y += 1
        return y

    options = dict(scaling=1.0, dropout_p=0.1, seed=seed)
    changed = run(in_place, leaves_of(args), dy, **options)
    copied = run(lambda **options: lora_linear(**options) + 1, leaves_of(args), dy, **options)
    assert all(torch.equal(changed[name], copied[name]) for name in copied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_in_float32(device, dtype):
    """Their gradients, too, are float32's, not rounded to x's dtype."""
    args = case(device, dtype, m=(60,), factors=torch.float32)
    dy = torch.randn(60, 40, device=device).to(dtype)
    ours = run(lora_linear, leaves_of(args), dy, scaling=2.0)
    exact = run(reference.lora_linear, leaves_of(args, torch.float64), dy, scaling=2.0)
    for name in ("lora_a", "lora_b"):
        assert relative_error(ours[name], exact[name]) < 1e-5


def test_weight_of_another_dtype(device):
    """As under autocast: the weight is read as it is, and at most rounded on the way."""
    args = case(device, torch.bfloat16, m=(20,)) | {"weight": torch.randn(40, 70, device=device)}
    exact = reference.lora_linear(**{n: t.double() for n, t in args.items()}, scaling=1.0)
    rounded = reference.lora_linear(**args, scaling=1.0)
    assert_as_exact_as_torch(lora_linear(**args, scaling=1.0), rounded, exact)


@pytest.mark.parametrize("m", [6, 40])
def test_strides(device, m):
    args = case(device, torch.float32, m=(2, m), bias=True)
    strided = {n: torch.stack([t, t + 1], -1)[..., 0] for n, t in args.items()}
    strided["x"] = args["x"].transpose(0, 1).contiguous().transpose(0, 1)
    dy = torch.randn(2, 2 * m, 40, device=device)[:, ::2]
    for a, b in zip(
        run(lora_linear, leaves_of(args), dy, scaling=1.0).values(),
        run(
            lora_linear, {n: t.requires_grad_() for n, t in strided.items()}, dy, scaling=1.0
        ).values(),
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "m,out,into,r",
    [
        ((0,), 8, 6, 2),
        ((3, 0), 8, 6, 2),
        ((4,), 0, 6, 2),
        ((4,), 8, 0, 2),
        ((4,), 8, 6, 0),
        ((20,), 8, 0, 0),
    ],
)
def test_nothing(device, m, out, into, r):
    args = leaves_of(case(device, torch.float32, m=m, out=out, into=into, r=r, bias=True))
    y = lora_linear(**args, scaling=1.0)
    torch.testing.assert_close(
        y, F.linear(args["x"], args["weight"] + args["lora_b"] @ args["lora_a"], args["bias"])
    )
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.isfinite().all() for t in args.values())


def test_nan_in_is_nan_out(device):
    args = case(device, torch.float32, m=(20,))
    args["x"][3, 5] = float("nan")
    y = lora_linear(**args, scaling=1.0)
    assert y[3].isnan().all() and y[:3].isfinite().all()


def test_same_inputs_same_bits(device):
    args = case(device, torch.bfloat16, m=(300,), out=200, into=500, r=16, magnitude=True)
    dy = torch.randn(300, 200, device=device).bfloat16()
    first, again = (
        run(lora_linear, leaves_of(args), dy, scaling=1.0, dropout_p=0.1, seed=3) for _ in range(2)
    )
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize(
    "m,out,into,r", [(100, 200, 500, 16), (17, 300, 64, 17), (5, 33, 130, 3), (600, 24, 70, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype, m, out, into, r):
    args = case("cpu", dtype, m=(m,), out=out, into=into, r=r, magnitude=True)
    dy, found, threads = torch.randn(m, out).to(dtype), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(lora_linear, leaves_of(args), dy, scaling=1.0, dropout_p=0.1, seed=3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name in set(other) - {"weight"}:  # a dense weight's own gradient is torch's product
            assert torch.equal(found[0][name], other[name]), name


# --- dropout ---


def test_philox_is_the_published_one():
    zero, ones = torch.zeros((), dtype=torch.int64), torch.tensor(0xFFFFFFFF)
    words = [
        0x5F6FB709,
        0x0D893F64,
        0x4F121F81,
        0x4F730A48,
    ]  # the known answer for a key and counter of zeros
    assert reference.philox(0, zero, zero).tolist() == words
    assert not torch.equal(reference.philox(0, zero, ones), reference.philox(0, ones, zero))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99])
def test_mask_statistics(p):
    mask = reference.dropout_mask(500, 640, p, 42)
    kept = (mask > 0).double()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5 + 1e-5
    assert torch.allclose(mask[mask > 0], torch.tensor(1 / (1 - p), dtype=torch.float64), rtol=1e-3)
    if 0 < p < 0.9:  # neighbors in a row and in a column, and other seeds, are independent
        others = [
            kept.roll(1, 0),
            kept.roll(1, 1),
            kept.roll(8, 1),
            (reference.dropout_mask(500, 640, p, 43) > 0).double(),
        ]
        for other in others:
            assert abs(torch.corrcoef(torch.stack([kept.flatten(), other.flatten()]))[0, 1]) < 0.01


@pytest.mark.parametrize("into", [1, 7, 8, 129, 300])
@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5, 987654321987654321])
def test_mask_is_the_reference_s_forward_and_backward(device, into, seed):
    """With A the identity and W zero, y is drop(x) and dx the mask times dy, exactly."""
    eye, zero = torch.eye(into, device=device), torch.zeros(into, into, device=device)
    for m in (1, 30):
        x = torch.ones(m, into, device=device, requires_grad=True)
        a = eye.clone().requires_grad_()
        y = lora_linear(x, zero, a, eye, scaling=1.0, dropout_p=0.3, seed=seed)
        mask = reference.dropout_mask(m, into, 0.3, seed, device).float()
        dx, da = torch.autograd.grad(y, [x, a], torch.ones_like(y))
        torch.testing.assert_close(y, mask)
        torch.testing.assert_close(dx, mask)
        torch.testing.assert_close(da, mask.sum(0).expand(into, into))


def test_a_dropout_too_small_to_keep_is_none(device):
    args = case(device, torch.float64, m=(3,))
    assert torch.equal(
        lora_linear(**args, scaling=1.0, dropout_p=1e-6), lora_linear(**args, scaling=1.0)
    )


def test_seed_is_torch_s_when_not_given(device):
    args = case(device, torch.float32, m=(20,))
    torch.manual_seed(5)
    first, second = (lora_linear(**args, scaling=1.0, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, lora_linear(**args, scaling=1.0, dropout_p=0.5)) and not torch.equal(
        first, second
    )


# --- DoRA ---


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_norms(device, base, dtype):
    args = case(device, dtype, out=70, into=130, r=8, base=base)
    weight = args["weight"]
    dense = reference.nf4_values(weight.state, weight.shape, 64) if base == "nf4" else weight
    w, a, b = dense.double(), args["lora_a"].double(), args["lora_b"].double()
    torch.testing.assert_close(row_squares(weight).double(), w.square().sum(1), rtol=1e-5, atol=0)
    for squares in (None, row_squares(weight)):
        norm = dora_norm(weight, args["lora_a"], args["lora_b"], 0.8, squares)
        torch.testing.assert_close(norm.double(), (w + 0.8 * b @ a).norm(dim=1), rtol=1e-5, atol=0)


def test_row_norms_under_autocast(device):
    args = case(device, torch.float32, out=70, into=130, r=8)
    norm = dora_norm(args["weight"], args["lora_a"], args["lora_b"], 0.8)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(dora_norm(args["weight"], args["lora_a"], args["lora_b"], 0.8), norm)


def test_dora_of_the_weight_s_own_norms_is_lora(device):
    args = case(device, torch.float32, m=(9,))
    norms = (args["weight"] + 0.5 * args["lora_b"] @ args["lora_a"]).norm(dim=1)
    torch.testing.assert_close(
        lora_linear(**args, scaling=0.5, magnitude=norms), lora_linear(**args, scaling=0.5)
    )


# --- projections that share x ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 40])
def test_projections_that_share_x(device, dtype, m):
    """On a CPU the same bits as one by one, but for dx, which is one sum of all."""
    cases = [
        case(device, dtype, m=(m,), out=out, r=r, base=base, bias=bias)
        for out, r, base, bias in (
            (40, 4, "dense", True),
            (24, 9, "nf4", False),
            (56, 16, "dense", False),
        )
    ]
    x = cases[0]["x"]
    dys = [torch.randn(m, c["lora_b"].shape[0], device=device).to(dtype) for c in cases]
    alone = []
    for i, c in enumerate(cases):
        c["x"] = x
        c["scaling"] = float(i + 1)
    inputs = [
        {n: t.clone().requires_grad_() if torch.is_tensor(t) else t for n, t in c.items()}
        for c in cases
    ]
    for i, c in enumerate(inputs):
        y = lora_linear(**c, dropout_p=0.2, seed=i)
        alone.append((y, *torch.autograd.grad(y, [c["x"], c["lora_a"], c["lora_b"]], dys[i])))
    own = x.clone().requires_grad_()
    ys = lora_linears(
        own,
        [Projection(**{n: t for n, t in c.items() if n != "x"}) for c in inputs],
        dropout_p=0.2,
        seeds=[0, 1, 2],
    )
    factors = [t for c in inputs for t in (c["lora_a"], c["lora_b"])]
    dx, *found = torch.autograd.grad(ys, [own, *factors], dys)
    for i, (y, _, da, db) in enumerate(alone):
        if device.type == "cpu":
            assert torch.equal(ys[i], y)
        torch.testing.assert_close(
            ys[i], y
        )  # on a GPU sums of few rows are split as their number asks for
        torch.testing.assert_close(found[2 * i], da)
        torch.testing.assert_close(found[2 * i + 1], db)
    assert relative_error(dx, sum(one[1].double() for one in alone)) < 4 * torch.finfo(dtype).eps


def test_only_some_of_the_projections_train(device):
    frozen, trained = (case(device, torch.float32, m=(9,)) for _ in range(2))
    trained["x"] = frozen["x"]
    both = [
        Projection(**{n: t for n, t in c.items() if n != "x"}, scaling=1.0)
        for c in (frozen, trained)
    ]
    leaf = both[1].lora_a.requires_grad_()
    ys = lora_linears(frozen["x"], both, dropout_p=0.5, seeds=[1, 2])
    (da,) = torch.autograd.grad(ys[1].sum(), leaf)
    alone = lora_linear(**trained, scaling=1.0, dropout_p=0.5, seed=2)
    torch.testing.assert_close(da, torch.autograd.grad(alone.sum(), leaf)[0])


# --- several adapters in a batch ---


def multi_case(device, dtype, m, ids, n=3, r=4, out=40, into=70, base="dense"):
    one = case(device, dtype, m=m, out=out, into=into, base=base, bias=True)
    one["lora_a"] = (torch.randn(n, r, into) / into**0.5).to(dtype).to(device)
    one["lora_b"] = torch.randn(n, out, r).to(dtype).to(device)
    return one, torch.tensor(ids, dtype=torch.int64, device=device).view(m)


BATCHES = {
    "in order": ((6,), [0, 0, 1, 1, 2, 2]),
    "mixed": ((2, 4), [2, -1, 0, 2, 1, 0, -1, 1]),
    "one adapter unused": ((5,), [0, 2, 2, 0, 2]),
    "none": ((4,), [-1] * 4),
    "one": ((3,), [1] * 3),
    "no rows": ((0,), []),
    "many": ((6, 35), [i * 7919 % 4 - 1 for i in range(210)]),
}


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_several_adapters(device, dtype, base, batch):
    args, ids = multi_case(device, dtype, *BATCHES[batch], base=base)
    options = {"adapter_ids": ids, "scaling": torch.tensor([0.5, 1.0, 2.0], device=device)}
    dy = torch.randn(*ids.shape, 40, device=device).to(dtype)
    ours = run(multi_lora_linear, leaves_of(args), dy, **options)
    exact = run(reference.multi_lora_linear, leaves_of(args, torch.float64), dy, **options)
    plain = run(reference.multi_lora_linear, leaves_of(args, dtype), dy, **options)
    for name, value in ours.items():
        assert_as_exact_as_torch(value, plain[name], exact[name])


def test_one_adapter_of_several_is_lora_linear(device):
    args, ids = multi_case(device, torch.float32, (40,), [1] * 40)
    alone = lora_linear(
        **args | {"lora_a": args["lora_a"][1], "lora_b": args["lora_b"][1]}, scaling=2.0
    )
    torch.testing.assert_close(multi_lora_linear(**args, adapter_ids=ids, scaling=2.0), alone)


def test_a_smaller_rank_is_padded_with_zeros(device):
    args, ids = multi_case(device, torch.float32, (12,), [i % 3 for i in range(12)])
    args["lora_a"][1, 2:] = 0
    args["lora_b"][1, :, 2:] = 0
    y = multi_lora_linear(**args, adapter_ids=ids, scaling=[1.0, 2.0, 3.0])
    small = {"lora_a": args["lora_a"][1, :2], "lora_b": args["lora_b"][1, :, :2]}
    torch.testing.assert_close(y[1::3], lora_linear(**args | small, scaling=2.0)[1::3])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_bf16_weight_times_a(size):
    """As tensor cores multiply it for DoRA's norm."""
    weight, a = torch.randn(48, 64).bfloat16(), torch.randn(8, 64) * size
    assert relative_error(dora._times_bfloat16(weight, a), weight.double() @ a.double().t()) < 1e-5


def test_row_squares_are_computed_again_for_another_weight_at_the_same_address():
    cache, weight = RowSquaresCache(), torch.randn(8, 6)
    squares = cache.get(weight, weight)
    assert cache.get(weight.t().t(), weight) is squares
    assert cache.get(weight.detach(), weight.detach()) is not squares  # another object
    weight.mul_(2)
    torch.testing.assert_close(cache.get(weight, weight), 4 * squares)
    assert copy.deepcopy(cache)._entry is None


def test_threads_that_share_row_squares_get_those_of_their_weight(monkeypatch):
    def slow_ref(tensor):
        time.sleep(1e-3)
        return weakref.ref(tensor)

    monkeypatch.setattr(dora, "weakref", SimpleNamespace(ref=slow_ref))
    cache, weights = RowSquaresCache(), [torch.ones(3, 4), torch.full((3, 4), 2.0)]
    results = {0: [], 1: []}

    def get(i):
        results[i] += [cache.get(weights[i], weights[i]) for _ in range(40)]

    threads = [threading.Thread(target=get, args=[i]) for i in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results[0]) == len(results[1]) == 40
    assert all(squares[0] == 4 for squares in results[0])
    assert all(squares[0] == 16 for squares in results[1])
