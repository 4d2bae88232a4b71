"""LSH attention's ops: values and gradients against float64, over all choices, sizes and layouts."""

import itertools

import pytest
import torch
from conftest import DTYPES, assert_as_exact_as_torch

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
        ids = torch.randint(n_buckets, (1 if k is None else 2, batch, heads, rounds, n), dtype=torch.int32)
        self.order, ranks = (t.to(device) for t in reference.lsh_sort_op(ids, n_buckets))
        self.buckets, self.ranks = ids.to(device) if same_bucket else None, ranks if correct_duplicates else None
        if mask is not None:
            mask = torch.full((batch, n), False) if mask == "none" else torch.rand(batch, n) < mask
        self.mask = None if mask is None else mask.to(device)
        self.seed = torch.tensor(-(2**40) - 5, device=device)
        self.dout = random(batch, heads, n, v_dim)
        self.dlse = torch.randn(batch, heads, n).to(device) if dlse else None

    def args(self, dtype=None):
        floats = [t if t is None or dtype is None else t.to(dtype) for t in (self.q, self.k, self.v)]
        return (*floats, self.order, self.buckets, self.ranks, self.mask, self.seed, *self.rest)

    def run(self, needs=(True, True, True)):
        args = self.args()
        out, lse = ops.lsh_attention(*args)
        return [out, lse, *ops.lsh_attention_backward(self.dout, self.dlse, *args[:3], out, lse, *args[3:], needs)]

    def reference(self, dtype, needs=(True, True, True), given=None):
        """In this dtype. With an output given, its errors reach the gradients, as those of any backward from it do."""
        args, dout = self.args(dtype), self.dout.to(dtype)
        out, lse = reference.lsh_attention_op(*args)
        dlse = torch.zeros_like(lse) if self.dlse is None else self.dlse.to(lse.dtype)
        if given is not None:
            wide = reference.lsh_attention_op(*self.args(torch.float64))[0]
            dlse = dlse + ((wide - given) * dout).sum(-1).to(lse.dtype)
        return [out, lse, *reference.lsh_attention_backward_op(dout, dlse, *args[:3], out, lse, *args[3:], needs)]


def check(problem, needs=(True, True, True)):
    ours, exact = problem.run(needs), problem.reference(torch.float64, needs)
    torchs = problem.reference(problem.q.dtype, needs, given=ours[0])
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


@pytest.mark.parametrize("i", range(120))
def test_mixtures(device, i):
    options = mixtures(120)[i]
    if options["key_norm"] == "none":
        options["scale"] /= options["sizes"][0]
    if options["n"] > 50:  # the reference draws a mask of all pairs
        options["dropout_p"] = 0.0
    dim, v_dim = options.pop("sizes")
    check(Problem(options.pop("n"), options.pop("dtype"), device, dim=dim, v_dim=v_dim, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rounds", [1, 4])
def test_sizes(device, n, rounds, dtype):
    check(Problem(n, dtype, device, dim=64, rounds=rounds, chunk_length=32, scale=0.125))
