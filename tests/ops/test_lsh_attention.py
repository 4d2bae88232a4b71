"""LSH attention's ops: values and gradients against float64, over all choices, sizes and layouts."""

import itertools
import math

import pytest
import torch
from helpers.tolerance import DTYPES, assert_as_exact_as_torch

from pyfast import reference

ops = torch.ops.pyfast
CHOICES = dict(
    dropout_p=0.0,
    chunk_length=16,
    scale=1.0,
    key_norm="rms",
    wrap="rounds",
    causal=True,
    attend_self=False,
    mask_queries=False,
)


class Problem:
    """Inputs of the ops; `tokens` says by numbers of buckets how they are sorted."""

    def __init__(self, n, dtype=torch.float32, device="cpu", *, batch=2, heads=2, dim=16, v_dim=None, rounds=2, k=None,
                 v_heads=None, same_bucket=False, correct_duplicates=False, mask=None, dlse=True, **choices):  # fmt: skip
        self.rest = tuple((CHOICES | choices).values())
        assert len(self.rest) == len(CHOICES)
        v_dim, v_heads = v_dim or dim, v_heads or k or heads

        def random(*shape):
            return torch.randn(*shape).to(device, dtype)

        self.q, self.v = random(batch, heads, n, dim), random(batch, v_heads, n, v_dim)
        self.k = None if k is None else random(batch, k, n, dim)
        n_buckets = max(2, 2 * n // (CHOICES | choices)["chunk_length"])
        ids = torch.randint(
            n_buckets, (1 if k is None else 2, batch, heads, rounds, n), dtype=torch.int32
        )
        self.order, ranks = (t.to(device) for t in reference.lsh_sort_op(ids, n_buckets))
        self.buckets, self.ranks = (
            ids.to(device) if same_bucket else None,
            ranks if correct_duplicates else None,
        )
        if mask is not None:
            mask = torch.full((batch, n), False) if mask == "none" else torch.rand(batch, n) < mask
        self.mask = None if mask is None else mask.to(device)
        self.seed = torch.tensor(-(2**40) - 5, device=device)
        self.dout = random(batch, heads, n, v_dim)
        self.dlse = torch.randn(batch, heads, n).to(device) if dlse else None

    def args(self, dtype=None):
        floats = [
            t if t is None or dtype is None else t.to(dtype) for t in (self.q, self.k, self.v)
        ]
        return (*floats, self.order, self.buckets, self.ranks, self.mask, self.seed, *self.rest)

    def run(self, needs=(True, True, True)):
        args = self.args()
        out, lse = ops.lsh_attention(*args)
        return [
            out,
            lse,
            *ops.lsh_attention_backward(
                self.dout, self.dlse, *args[:3], out, lse, *args[3:], needs
            ),
        ]

    def reference(self, dtype, needs=(True, True, True), errors=None):
        """In this dtype. The errors of the output that a backward is given reach its gradients."""
        args, dout = self.args(dtype), self.dout.to(dtype)
        out, lse = reference.lsh_attention_op(*args)
        dlse = torch.zeros_like(lse) if self.dlse is None else self.dlse.to(lse.dtype)
        if errors is not None:
            dlse = dlse - (errors * dout).sum(-1).to(lse.dtype)
        return [
            out,
            lse,
            *reference.lsh_attention_backward_op(dout, dlse, *args[:3], out, lse, *args[3:], needs),
        ]


def check(problem, needs=(True, True, True)):
    ours, exact = problem.run(needs), problem.reference(torch.float64, needs)
    torchs = problem.reference(problem.q.dtype, needs, errors=ours[0] - exact[0])
    lonely = exact[1].isinf()
    assert torch.equal(ours[1].isinf(), lonely)
    own = problem.v.repeat_interleave(problem.q.shape[1] // problem.v.shape[1], dim=1)
    assert torch.equal(ours[0][lonely], own[lonely])
    for tensors in (ours, torchs, exact):
        tensors[1] = tensors[1].masked_fill(lonely, 0)
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert_as_exact_as_torch(a, b, c)


SIZES = [1, 15, 16, 17, 50, 130, 300]
OPTIONS = dict(
    dtype=DTYPES,
    n=SIZES[1:],
    chunk_length=[16, 32, 48, 64, 256],
    rounds=[1, 2, 3, 5],
    key_norm=["rms", "l2", "none"],
    wrap=["rounds", "round", "none"],
    causal=[True, False],
    attend_self=[False, True],
    same_bucket=[False, True],
    correct_duplicates=[False, True],
    mask=[None, 0.7],
    mask_queries=[False, True],
    dropout_p=[0.0, 0.3],
    k=[None, 1, 2],
    sizes=[(16, 16), (64, 64), (7, 33), (2, 1), (40, 8), (256, 256)],
    scale=[0.5, 1.0],
    dlse=[True, False],
)


def mixtures(count):
    """Each value of each option about as often as its others, in combinations that no two options share."""
    generator = torch.Generator().manual_seed(1)
    columns = {}
    for name, values in OPTIONS.items():
        repeated = list(itertools.islice(itertools.cycle(values), count))
        columns[name] = [repeated[i] for i in torch.randperm(count, generator=generator)]
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


@pytest.mark.parametrize("i", range(100))
def test_mixtures(device, i):
    options = mixtures(100)[i]
    if options["key_norm"] == "none":
        options["scale"] /= options["sizes"][0]
    if options["n"] > 50:  # the reference draws a mask of all pairs
        options["dropout_p"] = 0.0
    dim, v_dim = options.pop("sizes")
    check(Problem(options.pop("n"), options.pop("dtype"), device, dim=dim, v_dim=v_dim, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_sizes(device, n, dtype):
    check(Problem(n, dtype, device, batch=1, dim=64, rounds=4, chunk_length=32, scale=0.125))


def test_one_dimension(device):
    check(Problem(50, device=device, dim=1, key_norm="none"))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("k", [None, 1])
def test_needs(device, needs, k):
    problem = Problem(70, device=device, k=k)
    found, every = problem.run(list(needs))[2:], problem.run()[2:]
    assert all(
        torch.equal(a, b) if need else a.numel() == 0 for a, b, need in zip(found, every, needs)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [dict(attend_self=True), dict(mask_queries=True)], ids=str)
def test_all_masked(device, dtype, options):
    """Everybody has its own value, and what is seen of it."""
    problem = Problem(40, dtype, device, mask="none", **options)
    out, lse, dq, _, dv = problem.run()
    assert torch.equal(out, problem.v) and (lse == -math.inf).all()
    assert not dq.any() and torch.equal(dv, problem.dout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, dict(k=1, causal=False), dict(k=2, heads=4, v_heads=1)], ids=str
)
def test_same_bits(dtype, options):
    problem = Problem(700, dtype, rounds=3, **options)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3, 3):
            torch.set_num_threads(n)
            found.append(problem.run())
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_many_heads_and_a_long_one(device):
    """More than are in flight at a time; and several segments."""
    check(Problem(20, device=device, batch=1700, v_heads=1, dim=2, dlse=False))
    check(Problem(1100, device=device, batch=1, heads=1, dim=4))


def test_strides(device):
    problem = Problem(60, device=device, k=2, mask=0.8, same_bucket=True, correct_duplicates=True)
    plain = problem.run()
    for name in ("q", "k", "v", "order", "buckets", "ranks", "mask", "dout", "dlse"):
        gapped = torch.stack([getattr(problem, name)] * 2, -1)[..., 0]
        assert not gapped.is_contiguous()
        setattr(problem, name, gapped)
    assert all(map(torch.equal, plain, problem.run()))


@pytest.mark.parametrize("batch, heads, n", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_nothing(device, batch, heads, n):
    problem = Problem(n, device=device, batch=batch, heads=heads)
    shapes = [
        (batch, heads, n, 16),
        (batch, heads, n),
        (batch, heads, n, 16),
        (0,),
        (batch, heads, n, 16),
    ]
    assert [tuple(t.shape) for t in problem.run()] == shapes


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(device, name, value):
    """Nothing is said of the result, but that it says so."""
    problem = Problem(90, device=device, k=2, same_bucket=True)
    getattr(problem, name).fill_(value)
    assert not all(t.isfinite().all() for t in problem.run())


WRONG = {
    "order": lambda t: [t + 1, t - 1, t.long(), t[..., 1:], t[:, :, :, :0], t[0]],
    "ranks": lambda t: [t + 1, t - 1, t.long(), t[..., 1:]],
    "buckets": lambda t: [t.long(), t[..., 1:]],
    "q": lambda t: [t.half(), t[..., 1:], t[0], t[:, :, :, :0]],
    "k": lambda t: [t.half(), t[..., 1:], t[0], t[:, :, 1:], t[:, :0], t.repeat(1, 2, 1, 1)[:, :3]],
    "v": lambda t: [t.half(), t[0], t[:, :, 1:], t[:, :0], t[..., :0]],
    "mask": lambda t: [t.int(), t[:, 1:], t[0]],
    "dout": lambda t: [t.half(), t[..., 1:]],
    "dlse": lambda t: [t.double(), t[..., 1:]],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors(name):
    problem = Problem(40, k=2, mask=0.8, same_bucket=True, correct_duplicates=True)
    right = getattr(problem, name)
    out, lse = ops.lsh_attention(*problem.args())
    for wrong in WRONG[name](right):
        setattr(problem, name, wrong)
        args = problem.args()
        if name not in ("dout", "dlse"):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                ops.lsh_attention(*args)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            rest = (out, lse, *args[3:], [True] * 3)
            ops.lsh_attention_backward(problem.dout, problem.dlse, *args[:3], *rest)


@pytest.mark.parametrize(
    "wrong",
    [dict(chunk_length=0), dict(chunk_length=24), dict(chunk_length=512), dict(key_norm="L2"), dict(wrap=""),
     dict(dropout_p=1.0), dict(dropout_p=-0.1), dict(dim=257)],
    ids=str,
)  # fmt: skip
def test_wrong_numbers(wrong):
    with pytest.raises(ValueError):
        chunk_length = wrong.get("chunk_length")
        problem = Problem(40, **{**wrong, "chunk_length": 16})
        if chunk_length is not None:
            problem.rest = (problem.rest[0], chunk_length, *problem.rest[2:])
        ops.lsh_attention(*problem.args())


def test_orders_that_are_none(device):
    """Positions in range, but not each once: no result is promised, only that memory is left alone.

    Each input stands between guards in a larger tensor, none of which may change.
    """
    problem = Problem(100, device=device, correct_duplicates=True)
    right_order, right_ranks = problem.order.clone(), problem.ranks.clone()
    expected = problem.run()
    guarded = {}
    for name in ("q", "v", "order", "ranks", "dout", "dlse"):
        tensor = getattr(problem, name)
        buffer = torch.full((tensor.numel() + 512,), 7, dtype=tensor.dtype, device=device)
        guarded[name] = buffer
        setattr(problem, name, buffer[256:-256].view(tensor.shape).copy_(tensor))

    def check_memory():
        before = {name: buffer.clone() for name, buffer in guarded.items()}
        results = problem.run()
        assert all(torch.equal(before[name], guarded[name]) for name in guarded)
        assert [t.shape for t in results if t is not None] == [
            t.shape for t in expected if t is not None
        ]

    problem.order.fill_(7)
    problem.ranks.fill_(3)
    check_memory()
    problem.order.random_(100)
    check_memory()
    problem.order.copy_(right_order)
    problem.ranks.copy_(right_ranks)
    for result, right in zip(problem.run(), expected):
        assert result is right is None or torch.equal(result, right)
