"""The Triton kernels of LoRA against the reference ops.

test_nf4_triton.py says how and where they run.
"""

import pytest
import torch
import triton
import triton.language as tl
from helpers.tolerance import FLOOR, assert_as_exact_as_torch
from helpers.triton_inputs import DEVICE, DTYPES, GPU, native, random, random_state

from pyfast import reference
from pyfast.kernels import _dropout, lora, lora_backward, lora_base, nf4_linear
from pyfast.ops.lora_arguments import make_route

pytestmark = native
PATHS = ["gemv", "fused", "panel"]
# The adapter of each row, of 5 adapters: 1 and 3 have no row.
IDS = torch.tensor([2, 0, -1, 0, 2, 2, -1, 4, 0, 2, 0])


def converted(value, dtype):
    """Return the value with all floating tensors in dtype."""
    if isinstance(value, list):
        return [converted(v, dtype) for v in value]
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def judge(op, dtype, path=None, **args):
    """Assert that the launcher is as exact as the reference with inputs rounded to dtype.

    The reference in float64 is the truth. Return the launcher's results.
    """
    launcher = getattr(lora_backward if op.endswith("backward") else lora, op)
    options = {} if path is None else {"path": path}
    results = launcher(**args, **options)
    if GPU:
        again = launcher(**args, **options)
        assert all(map(torch.equal, listed(results), listed(again)))
    if args.get("blocksize"):
        values = reference.nf4_values(args["base"], args["shape"], args["blocksize"])
        args |= {"base": [values], "blocksize": 0}
    judged = getattr(reference, f"lora_{op}_op")
    exact = judged(**{name: converted(value, torch.float64) for name, value in args.items()})
    plain = judged(**{name: converted(value, dtype) for name, value in args.items()})
    for result, rounded, right in zip(listed(results), listed(plain), listed(exact), strict=True):
        # Torch's one number may be right by chance, so the precision of the inputs is the bound.
        if result.numel() == 1 and dtype != result.dtype:
            torch.testing.assert_close(result.double(), right, rtol=4 * FLOOR[dtype], atol=0)
        else:
            assert_as_exact_as_torch(result, rounded.to(result.dtype), right)
    return results


def listed(results):
    """Return the results as a list, also if there is one."""
    return list(results) if isinstance(results, tuple | list) else [results]


def routed(lead, n=5):
    """Return [order, starts, scales] for rows with the adapters IDS, over and over."""
    rows = torch.Size(lead).numel()
    ids = IDS.repeat(rows // len(IDS) + 1)[:rows].view(lead)
    scales = torch.tensor([1.0, 2.0, 0.5, 4.0, 0.25])[:n]
    route = make_route(torch.empty(*lead, 1), ids, scales, n)
    return [t.to(DEVICE) for t in route]


def base_of(base_format, shape, dtype):
    """Return base and blocksize of a weight: dense, transposed, plain or nested NF4."""
    if base_format == "dense":
        return [random(*shape, dtype=dtype, seed=9)], 0
    if base_format == "transposed":
        return [random(*shape[::-1], seed=9).t()], 0
    return random_state(shape, 64, base_format == "nested"), 64


def seeds_of(count):
    """Return `count` seeds, small, large and negative."""
    return torch.tensor([-5, 2**40 + 3, 7, 11][:count], device=DEVICE)


# ---------------------------------------------------------------- dropout


@triton.jit
def _philox_kernel(seed_ptr, out_ptr, first):
    row, counter = first + tl.arange(0, 4).to(tl.int64), tl.arange(0, 8)
    words = _dropout.philox(tl.load(seed_ptr), row[:, None], counter[None, :])
    at = out_ptr + (tl.arange(0, 4)[:, None] * 8 + counter[None, :]) * 4
    for i in tl.static_range(4):
        tl.store(at + i, words[i].to(tl.int64))


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("first", [0, 2**31 - 2, 2**35 - 2])
def test_philox_equals_the_reference(first, seed):
    words = torch.empty(4, 8, 4, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](torch.tensor([seed], device=DEVICE), words, first)
    row, counter = first + torch.arange(4)[:, None], torch.arange(8)[None]
    assert torch.equal(words.cpu(), reference.philox(seed, row, counter))


@triton.jit
def _keeps_kernel(seed_ptr, out_ptr, first, threshold):
    keeps = _dropout.dropout_keeps(seed_ptr, tl.arange(0, 16).to(tl.int64), first, threshold, 32)
    tl.store(
        out_ptr + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :], keeps.to(tl.int8)
    )


@pytest.mark.parametrize("p", [2**-16, 0.05, 0.5, 1 - 2**-17])
def test_the_dropout_mask_equals_the_reference(p):
    keeps = torch.empty(16, 32, dtype=torch.int8, device=DEVICE)
    _keeps_kernel[(1,)](seeds_of(1), keeps, 64, _dropout.dropout_threshold(p))
    assert _dropout.dropout_threshold(p) == reference.dropout_threshold(p)
    assert torch.equal(keeps.bool().cpu(), reference.dropout_mask(16, 96, p, -5)[:, 64:] > 0)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(1,), (16,), (20, 4, 64), (0, 3)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink_is_right_for_several_projections(p, ranks, dtype):
    x = random(3, 7, 150, dtype=dtype)
    a = [
        random(1, r, 150, dtype=dtype if i == 1 else torch.float32, seed=i)
        for i, r in enumerate(ranks)
    ]
    for scaling in ([2.0] * len(ranks), [0.7 + i for i in range(len(ranks))]):
        seeds = seeds_of(len(ranks)) if p else None
        judge("shrink", dtype, x=x, lora_a=a, scaling=scaling, dropout_p=p, seeds=seeds, route=[])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2, 9), (300,)], ids=str)
def test_shrink_is_right_for_several_adapters(rows, dtype):
    x, a = random(*rows, 70, dtype=dtype), [random(5, 20, 70)]
    s = judge(
        "shrink", dtype, x=x, lora_a=a, scaling=[2.0], dropout_p=0.0, seeds=None, route=routed(rows)
    )
    nobody = IDS.repeat(300)[: torch.Size(rows).numel()].view(rows) < 0
    assert s[nobody.to(DEVICE)].count_nonzero() == 0


BASES = ["dense", "transposed", "plain", "nested"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("base_format", BASES)
@pytest.mark.parametrize(
    ("rows", "shape", "rank"), [((3,), (70, 128), 16), ((2, 9), (33, 71), 20)], ids=str
)
def test_linear_is_right(rows, shape, rank, base_format, path, dtype):
    base, blocksize = base_of(base_format, shape, dtype)
    x, s, b = (
        random(*rows, shape[1], dtype=dtype),
        random(*rows, rank, seed=2),
        random(1, shape[0], rank, seed=3),
    )
    gain, bias = random(shape[0], seed=4).abs() + 0.5, random(shape[0], dtype=dtype, seed=5)
    fixed = dict(x=x, base=base, shape=shape, blocksize=blocksize, path=path)
    judge("linear", dtype, s=s, lora_b=b, bias=None, gain=None, route=[], **fixed)
    judge("linear", dtype, s=s, lora_b=b.to(dtype), bias=bias, gain=gain, route=[], **fixed)
    some = random(5, shape[0], rank, seed=6)
    judge(
        "linear", dtype, s=s, lora_b=some, bias=bias.float(), gain=None, route=routed(rows), **fixed
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("base_format", ["dense", "nested"])
def test_linear_is_right_without_a_rank(base_format, path, dtype):
    """The plain product has no rank; DoRA's norm asks for it."""
    shape = (24, 192)
    base, blocksize = base_of(base_format, shape, torch.float16)
    for m, bias in ((5, None), (40, random(24))):
        x, s, b = random(m, 192, dtype=dtype), random(m, 0), random(1, 24, 0)
        fixed = dict(base=base, gain=None, shape=shape, blocksize=blocksize, route=[], path=path)
        judge("linear", dtype, x=x, s=s, lora_b=b, bias=bias, **fixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 64])
def test_split_sums_add_the_low_rank_half_once(rank, dtype):
    """Long sums over few tiles are split, and the LoRA half is in the first part only."""
    shape, rows = (40, 4096) if GPU else (20, 1024), (2,)
    s, b, bias = random(*rows, rank), random(1, shape[0], rank), random(shape[0])
    for base_format in ("dense", "nested"):
        base, blocksize = base_of(base_format, shape, dtype)
        args = dict(
            base=base, gain=bias.abs() + 1, shape=shape, blocksize=blocksize, route=[], path="gemv"
        )
        judge(
            "linear",
            dtype,
            x=random(*rows, shape[1], dtype=dtype),
            s=s,
            lora_b=b,
            bias=bias,
            **args,
        )
        shape_t = shape[::-1]
        base, blocksize = base_of(base_format, shape_t, dtype)
        args = dict(base=base, gain=None, shape=shape_t, blocksize=blocksize, route=[], path="gemv")
        args |= dict(add=random(*rows, shape_t[1], dtype=dtype), dropout_p=0.1, seed=seeds_of(1)[0])
        dy, a = random(*rows, shape_t[0], dtype=dtype), random(1, rank, shape_t[1])
        judge("linear_backward", dtype, dy=dy, u=s, lora_a=a, **args)


# ---------------------------------------------------------------- backward


NEEDS = [
    (True, True, True, True),
    (True, False, False, False),
    (False, True, True, False),
    (False, False, True, False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "rank"), [((1,), 1), ((2, 9), 20), ((300,), 16), ((5,), 80)], ids=str
)
def test_expand_backward_is_right(rows, rank, dtype):
    dy, y, s = (
        random(*rows, 150, dtype=dtype),
        random(*rows, 150, dtype=dtype, seed=2),
        random(*rows, rank, seed=3),
    )
    gain = random(150, seed=4).abs() + 0.5
    for i, needs in enumerate(NEEDS):
        args = dict(dy=dy, s=s, gain=gain if i % 2 == 0 else None, scaling=2.0, needs=needs)
        args |= dict(z=y if needs[3] else None)
        b = random(1, 150, rank, dtype=dtype if i == 1 else torch.float32)
        judge("expand_backward", dtype, lora_b=b, route=[], **args)
        if i < 2:
            judge("expand_backward", dtype, lora_b=random(5, 150, rank), route=routed(rows), **args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("base_format", BASES)
@pytest.mark.parametrize(
    ("rows", "shape", "rank"), [((3,), (70, 128), 16), ((2, 9), (33, 71), 20)], ids=str
)
def test_linear_backward_is_right(rows, shape, rank, base_format, path, dtype):
    base, blocksize = base_of(base_format, shape, dtype)
    dy, u, a = (
        random(*rows, shape[0], dtype=dtype),
        random(*rows, rank, seed=2),
        random(1, rank, shape[1], seed=3),
    )
    gain, add = random(shape[0], seed=4).abs() + 0.5, random(*rows, shape[1], dtype=dtype, seed=5)
    fixed = dict(dy=dy, u=u, base=base, shape=shape, blocksize=blocksize, path=path)
    plain, dropped = dict(dropout_p=0.0, seed=None), dict(dropout_p=0.3, seed=seeds_of(1)[0])
    judge("linear_backward", dtype, lora_a=a, gain=None, add=None, route=[], **plain, **fixed)
    judge(
        "linear_backward",
        dtype,
        lora_a=a.to(dtype),
        gain=gain,
        add=add,
        route=[],
        **dropped,
        **fixed,
    )
    some = random(5, rank, shape[1], seed=6)
    judge(
        "linear_backward",
        dtype,
        lora_a=some,
        gain=None,
        add=add,
        route=routed(rows),
        **plain,
        **fixed,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "ranks"), [((1,), (1,)), ((2, 9), (20, 4, 33)), ((300,), (16,)), ((5,), (3, 80))]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink_backward_is_right(p, rows, ranks, dtype):
    x, u = random(*rows, 150, dtype=dtype), random(*rows, sum(ranks), seed=2)
    seeds = seeds_of(len(ranks)) if p else None
    for n, route, out in ((1, [], torch.float32), (5, routed(rows), dtype)):
        grads = lora_backward.shrink_backward(u, x, list(ranks), n, p, seeds, route, out)
        exact = reference.lora_shrink_backward_op(
            u.double(), x.double(), ranks, n, p, seeds, route, torch.float64
        )
        plain = reference.lora_shrink_backward_op(u.to(dtype), x, ranks, n, p, seeds, route, out)
        for result, rounded, right in zip(grads, plain, exact, strict=True):
            assert_as_exact_as_torch(result, rounded, right)


# ---------------------------------------------------------------- shapes, strides, edges


@pytest.mark.parametrize("base_format", BASES)
def test_row_squares_are_right(base_format):
    for shape in ((33, 71), (5, 256), (0, 64), (3, 0)):
        base, blocksize = base_of(base_format, shape, torch.float16)
        squares = lora.row_squares(base, shape, blocksize)
        torch.testing.assert_close(
            squares, reference.lora_row_squares_op(base, shape, blocksize).float()
        )


@pytest.mark.parametrize("path", PATHS)
def test_arguments_may_have_any_strides(path):
    """S is columns of a wider matrix, x every second row, B and A transposed; vectors have gaps."""
    dtype, shape, rows = torch.float16, (40, 64), (3, 4)
    x = random(6, 4, 128, dtype=dtype)[::2, :, ::2]
    s = random(*rows, 30).split([10, 20], dim=-1)[1]
    b, a = random(1, 20, 40).mT, random(1, 64, 20).mT
    vectors = dict(bias=random(80)[::2], gain=random(80, seed=2)[::2])
    dy, y = (
        random(4, 3, 40, dtype=dtype).transpose(0, 1),
        random(40, 3, 4, dtype=dtype).permute(1, 2, 0),
    )
    for base_format in ("transposed", "nested"):
        base, blocksize = base_of(base_format, shape, dtype)
        fixed = dict(base=base, shape=shape, blocksize=blocksize, route=[], path=path)
        judge("linear", dtype, x=x, s=s, lora_b=b, **vectors, **fixed)
        rest = dict(gain=vectors["gain"], add=x, dropout_p=0.2, seed=seeds_of(2)[1])
        judge("linear_backward", dtype, dy=dy, u=s, lora_a=a, **rest, **fixed)
    judge(
        "shrink",
        dtype,
        x=x,
        lora_a=[a, a],
        scaling=[1.0, 1.0],
        dropout_p=0.2,
        seeds=seeds_of(4)[::2],
        route=[],
    )
    rest = dict(gain=vectors["gain"], z=y, scaling=3.0, route=[], needs=[True] * 4)
    judge("expand_backward", dtype, dy=dy, s=s, lora_b=b, **rest)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 64), (3, 0, 64), (3, 8, 0), (0, 0, 0)])
def test_empty_sizes_give_what_sum_there_is(m, n, k, path):
    """Without rows, outputs or inputs the result is empty, or the sum of what there is."""
    dtype, shape = torch.float32, (n, k)
    x, dy, low = random(m, k), random(m, n), random(m, 4)
    a, b = random(1, 4, k), random(1, n, 4)
    for base_format in ("dense", "plain"):
        base, blocksize = base_of(base_format, shape, dtype)
        fixed = dict(base=base, gain=None, shape=shape, blocksize=blocksize, route=[], path=path)
        judge("linear", dtype, x=x, s=low, lora_b=b, bias=random(n), **fixed)
        rest = dict(add=None, dropout_p=0.0, seed=None)
        judge("linear_backward", dtype, dy=dy, u=low, lora_a=a, **rest, **fixed)
    judge("shrink", dtype, x=x, lora_a=[a], scaling=[2.0], dropout_p=0.0, seeds=None, route=[])
    grads = lora_backward.expand_backward(dy, low, b, None, dy, 1.0, [], [True] * 4)
    exact = dy @ b[0], (dy.t() @ low)[None], dy.sum(0), dy.square().sum(0)
    torch.testing.assert_close(grads, exact)
    (da,) = lora_backward.shrink_backward(low, x, [4], 1, 0.0, None, [], dtype)
    torch.testing.assert_close(da, (low.t() @ x)[None])


def test_several_panels_are_right(monkeypatch):
    """There is more than one panel, and the last one is short, with and without a gain."""
    monkeypatch.setattr(nf4_linear, "PANEL_BYTES", dict.fromkeys(nf4_linear.PANEL_BYTES, 1))
    for n, k in ((140, 64), (9, 151)):
        for base_format, gain in (
            ("nested", None),
            ("nested", random(n)),
            ("dense", random(n)),
            ("dense", None),
        ):
            base, blocksize = base_of(base_format, (n, k), torch.float16)
            fixed = dict(
                base=base, gain=gain, shape=(n, k), blocksize=blocksize, route=[], path="panel"
            )
            low = random(5, 4)
            judge(
                "linear",
                torch.float32,
                x=random(5, k),
                s=low,
                lora_b=random(1, n, 4),
                bias=None,
                **fixed,
            )
            rest = dict(add=None, dropout_p=0.0, seed=None)
            judge(
                "linear_backward",
                torch.float32,
                dy=random(5, n),
                u=low,
                lora_a=random(1, 4, k),
                **rest,
                **fixed,
            )


def test_gradients_of_no_rank_are_empty():
    dy, x, none = random(5, 40), random(5, 64), random(5, 0)
    u, db, total, _ = lora_backward.expand_backward(
        dy, none, random(1, 40, 0), None, None, 1.0, [], [True, True, True, False]
    )
    assert u.shape == (5, 0) and db.shape == (1, 40, 0)
    torch.testing.assert_close(total, dy.sum(0))
    grads = lora_backward.shrink_backward(none, x, [0, 0], 1, 0.0, None, [], torch.float32)
    assert [da.shape for da in grads] == [(1, 0, 64)] * 2
    first, second = lora_backward.shrink_backward(
        x[:, :3], x, [0, 3], 1, 0.5, seeds_of(2), [], torch.float32
    )
    assert first.shape == (1, 0, 64) and second.shape == (1, 3, 64)


def test_rows_of_a_wrong_route_stay_inside():
    """Rows that do not exist are clamped."""
    route = routed((11,))
    route[0] = route[0] * 1000 - 5000
    lora.shrink(random(11, 64), [random(5, 4, 64)], [1.0], 0.0, None, route)


def test_the_path_follows_the_number_of_rows():
    x, half = torch.empty(0), torch.empty(0, dtype=torch.float16)
    for op in ("linear", "linear_backward"):
        dense = [lora_base.choose(op, m, (64, 64), 0, half) for m in (1, 32, 33)]
        assert dense == ["fused", "fused", "panel"]
        nf4 = [lora_base.choose(op, m, (64, 64), 64, half) for m in (1, 17, 8192)]
        assert nf4 == ["gemv", "fused", "panel"]
        assert lora_base.choose(op, 100, (64, 64), 0, x) == "panel"


@pytest.mark.needs("gpu")
def test_offsets_beyond_two_to_the_31_are_right():
    m, k = 2**19 + 3, 4096
    x, a = torch.randn(m, k, device=DEVICE, dtype=torch.float16), [random(1, 16, k)]
    s = lora.shrink(x, a, [1.0], 0.0, None, [])
    torch.testing.assert_close(
        s[-5:], lora.shrink(x[-5:], a, [1.0], 0.0, None, []), rtol=1e-3, atol=1e-2
    )
    w, b = [random(16, k, dtype=torch.float16)], random(1, 16, 16)
    for path in ("fused", "panel"):
        y = lora.linear(x, s, w, b, None, None, (16, k), 0, [], path=path)
        short = lora.linear(x[-5:], s[-5:], w, b, None, None, (16, k), 0, [], path=path)
        torch.testing.assert_close(y[-5:], short, rtol=1e-2, atol=0.5)


# ---------------------------------------------------------------- what is registered


def test_registered_ops_refuse_what_does_not_fit():
    x, s, w, b = (
        torch.empty(*size, device="meta") for size in ((3, 70), (3, 4), (24, 70), (1, 24, 4))
    )
    op = torch.ops.pyfast.lora_linear
    assert op(x, s, [w], b, None, None, (24, 70), 0, []).shape == (3, 24)
    for wrong, message in (
        ((x[:, :-1], s, [w], b, None, None, (24, 70), 0, []), "last dimension of 70"),
        ((x, s[:2], [w], b, None, None, (24, 70), 0, []), "s has shape"),
        ((x, s, [w[:5]], b, None, None, (24, 70), 0, []), "base has shape"),
        ((x, s, [w], b, None, None, (24, 70), 64, []), "state holds"),
        ((x, s, [w], b[:, :5], None, None, (24, 70), 0, []), "lora_b has shape"),
        ((x, s, [w], b, x[0], None, (24, 70), 0, []), "bias has shape"),
        ((x, s, [w], b, None, None, (24, 70), 0, [w, w, w]), "route is"),
        ((x, s, [w], b.expand(2, 24, 4), None, None, (24, 70), 0, []), "route is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*wrong)
    with pytest.raises(ValueError, match="seeds is None"):
        torch.ops.pyfast.lora_shrink(
            x, [torch.empty(1, 4, 70, device="meta")], [1.0], 0.5, None, []
        )
