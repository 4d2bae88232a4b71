"""Hashing and sorting for LSH attention, against definitions in plain PyTorch."""

import os
import subprocess
import sys

import pytest
import torch

import pyfast
from pyfast import reference
from pyfast.ops.registered.lsh_hash import hash_tokens, make_rotations, sort

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def buckets_by_hand(x, rotations, factors):
    """Ids by argmax over [x r, -x r], and by how much the best direction wins."""
    rotated = torch.einsum(
        "bhnd,bhdrw->bhrnw", x.double(), rotations.double().expand(*x.shape[:2], -1, -1, -1)
    )
    ids, margin, unit, start = 0, torch.inf, 1, 0
    for factor in factors:
        part = rotated[..., start : start + factor // 2]
        both = torch.cat([part, -part], dim=-1).sort(dim=-1, descending=True)
        ids = ids + unit * both.indices[..., 0]
        margin = (both.values[..., 0] - both.values[..., 1]).clamp(max=margin)
        unit, start = unit * factor, start + factor // 2
    return ids.int(), margin


@pytest.mark.parametrize("factors", [(2,), (10,), (64,), (200,), (16, 6), (4, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash(device, factors, dtype):
    for n, dim in ((1, 3), (70, 64), (129, 300)):
        x = torch.randn(2, 3, n, dim, device=device).to(dtype)
        for lead in ((1, 1), (1, 3), (2, 1), (2, 3)):
            rotations = torch.randn(*lead, dim, 3, sum(factors) // 2, device=device)
            ids, margin = buckets_by_hand(x, rotations, factors)
            sure = margin > 1e-3
            assert sure.float().mean() > 0.9
            assert torch.equal(hash_tokens(x, rotations, factors)[sure], ids[sure])


def test_strides_and_shared_heads(device):
    x, rotations = (
        torch.randn(2, 70, 3, 12, device=device),
        torch.randn(1, 3, 12, 2, 4, device=device),
    )
    for view in (
        x.transpose(1, 2),
        x.transpose(1, 2)[..., ::2],
        x[:, :, :1].transpose(1, 2).expand(2, 3, 70, 12),
    ):
        r = rotations[:, :, : view.shape[-1]]
        assert torch.equal(
            hash_tokens(view, r, [8]), hash_tokens(view.contiguous(), r.contiguous(), [8])
        )


def test_ties_and_nothing_finite(device):
    """The first of equals; no crash, and the same for the same row, where there is no best."""
    x = torch.zeros(1, 1, 4, 2, device=device)
    x[0, 0, 1], x[0, 0, 2, 0], x[0, 0, 3] = torch.nan, torch.inf, torch.tensor([1.0, 0.0])
    rotations = torch.tensor([[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]], device=device).view(1, 1, 2, 1, 3)
    ids = hash_tokens(x, rotations, [6]).flatten().tolist()
    assert ids[0] == 0 and ids[3] == 0 and all(0 <= i < 6 for i in ids)


@pytest.mark.parametrize("n_buckets", [1, 7, 5000, 1 << 20, (1 << 31) - 1])
def test_sort_is_stable(device, n_buckets):
    for n in (1, 16, 3001):
        ids = torch.randint(n_buckets, (2, 3, n), dtype=torch.int64, device=device).int()
        ids[0, 0, : n // 2] = n_buckets - 1
        order, ranks = sort(ids, n_buckets)
        assert torch.equal(order, ids.argsort(dim=-1, stable=True).int())
        assert torch.equal(
            ranks.long().gather(-1, order.long()), torch.arange(n, device=device).expand(2, 3, n)
        )


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)], ids=str)
def test_sort_of_nothing(device, shape):
    order, ranks = sort(torch.empty(shape, dtype=torch.int32, device=device), 4)
    assert order.shape == ranks.shape == shape


def test_ids_out_of_range():
    for wrong in (-1, 4, 1 << 30):
        with pytest.raises(
            ValueError, match=rf"ids from {min(0, wrong)} to {max(3, wrong)}; they must be 0 to 3"
        ):
            sort(torch.tensor([0, 3, wrong], dtype=torch.int32), 4)


def test_rotations_are_the_reference_s(device):
    for count in (1, 63, 64, 65, 1000):
        for seed in (0, -5, 2**62 + 1):
            seed = torch.tensor(seed, device=device)
            found, expected = (
                make_rotations(seed, (count,)),
                reference.lsh_rotations_op(seed, (count,)),
            )
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


def test_rotations_are_normal(device):
    x = make_rotations(torch.tensor(7, device=device), (2, 50000)).double()
    assert x.mean().abs() < 0.01 and (x.std() - 1).abs() < 0.01
    assert (x.pow(4).mean() - 3).abs() < 0.1 and x.abs().max() < 6
    assert (
        torch.corrcoef(x)[0, 1].abs() < 0.02
        and torch.corrcoef(torch.stack([x[0, ::2], x[0, 1::2]]))[0, 1].abs() < 0.02
    )
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=device)
    expected = torch.tensor([-1.2816, 0.0, 1.2816], dtype=torch.float64, device=device)
    torch.testing.assert_close(x.flatten().quantile(quantiles), expected, atol=0.02, rtol=0)


def test_near_vectors_share_buckets(device):
    """What it is all for: the share falls with the angle."""
    x = torch.randn(1, 1, 2000, 32, device=device)
    shares = []
    for noise in (0.05, 0.5, 2.0):
        both = torch.cat([x, x + noise * torch.randn_like(x)], dim=1)
        rotations = torch.randn(1, 1, 32, 4, 8, device=device)
        ids = hash_tokens(both, rotations, [16])
        shares.append((ids[:, 0] == ids[:, 1]).float().mean().item())
    assert shares[0] > 0.85 > shares[1] > shares[2] and shares[2] < 0.35


# --- the function ---


def test_lsh_buckets(device):
    qk = torch.randn(2, 3, 50, 12, device=device)
    ids = pyfast.lsh_buckets(qk, n_hashes=3, n_buckets=8, seed=5)
    assert (
        ids.shape == (2, 3, 3, 50) and ids.dtype == torch.int32 and 0 <= ids.min() <= ids.max() < 8
    )
    assert torch.equal(
        ids, pyfast.lsh_buckets(qk, n_hashes=3, n_buckets=(8,), seed=torch.tensor(5))
    )
    assert not torch.equal(ids, pyfast.lsh_buckets(qk, n_hashes=3, n_buckets=8, seed=6))
    assert not torch.equal(ids[:, :, 0], ids[:, :, 1])  # rounds differ
    same = qk[:, :1].expand_as(qk)
    assert not torch.equal(
        *pyfast.lsh_buckets(same, n_buckets=8, seed=5)[:, :2].unbind(1)
    )  # so do heads
    mask = torch.rand(2, 50, device=device) < 0.7
    padded = pyfast.lsh_buckets(qk, n_hashes=3, n_buckets=8, seed=5, key_padding_mask=mask)
    assert torch.equal(padded, torch.where(mask[:, None, None], ids, 8))


def test_torch_s_generator_governs(device):
    qk = torch.randn(1, 2, 40, 8, device=device)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(pyfast.lsh_buckets(qk, n_buckets=8))
    assert torch.equal(*found[:2]) and not torch.equal(*found[1:])


def test_many_buckets_are_factored(device):
    qk = torch.randn(1, 1, 600, 16, device=device)
    factors = pyfast.reference.lsh_options.factored(512)
    assert factors == (32, 16)
    ids = pyfast.lsh_buckets(qk, n_buckets=512, seed=1)
    assert 128 < ids.max() < 512
    rotations = torch.randn(16, 2, 24, device=device)
    assert torch.equal(
        pyfast.lsh_buckets(qk, n_buckets=512, rotations=rotations),
        pyfast.lsh_buckets(qk, n_buckets=(32, 16), rotations=rotations),
    )
    whole = pyfast.lsh_buckets(
        qk, n_buckets=512, rotations=torch.randn(16, 2, 256, device=device)
    )  # unfactored
    assert whole.shape == (1, 1, 2, 600) and whole.max() < 512


@pytest.mark.parametrize("rule", ["trax", "hf", "lucidrains"])
def test_default_buckets(rule):
    """Even factors; about twice (or once) the number of chunks."""
    for length in (1, 63, 64, 1000, 4096, 65536, 1 << 20):
        factors = pyfast.reference.lsh_options.default_buckets(rule, length, 64)
        total, chunks = torch.tensor(factors).prod().item(), max(1, length // 64)
        assert all(factor % 2 == 0 and factor > 0 for factor in factors)
        most = max(2, chunks) if rule == "lucidrains" else 2 * chunks
        assert most / 2 <= total <= most


def test_same_ids_at_any_thread_count_and_isa():
    """On eighths, whose products are exact: where the rounding of sums does not decide, nothing else may."""
    code = """
import sys, torch, pyfast
torch.manual_seed(0)
x, rotations = (torch.randn(2, 2, 700, 32) * 8).round() / 8, (torch.randn(32, 4, 12) * 8).round() / 8
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    ids = pyfast.lsh_buckets(x, n_buckets=(16, 8), rotations=rotations)
    order, ranks = pyfast.ops.registered.lsh_hash.sort(ids, 128)
    print(ids.double().mul(torch.arange(700)).sum().item(), order.long().mul(ranks).sum().item())
"""
    found = []
    for isa, threads in (("", "123"), ("avx2", "2"), ("portable", "2")):
        command = [sys.executable, "-W", "ignore", "-c", code, *threads]
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYFAST_CPU": isa})
        assert done.returncode == 0, done.stderr[-2000:]
        found += done.stdout.splitlines()
    assert len(found) == 5 and len(set(found)) == 1
