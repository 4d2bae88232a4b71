"""LSH attention of some rows: values against the reference over all tokens."""

import pytest
import torch
from helpers.tolerance import assert_as_exact_as_torch

from pyfast import reference
from pyfast.nn import lsh_decoding
from pyfast.reference import lsh_options


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50, 64])
@pytest.mark.parametrize("wrap", lsh_options.WRAPS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_rows_are_those_of_the_reference(rounds, wrap, n):
    rows = torch.randperm(n)[: min(n, 7)]
    for i, key_norm in enumerate(lsh_options.KEY_NORMS * 2):
        flags = {
            name: bool(torch.rand(()) < 0.5)
            for name in ("same_bucket", "correct_duplicates", "attend_self")
        }
        separate, masked = bool(i % 2), i % 4 < 2
        choices = lsh_options.LSHChoices(key_norm=key_norm, wrap=wrap, mask_queries=masked, **flags)
        q, k = torch.randn(2, 4, n, 6).double(), torch.randn(2, 2, n, 6).double()
        v = torch.randn(2, 2, n, 5).double()
        buckets = torch.randint(4, (1 + separate, 2, 4, rounds, n), dtype=torch.int32)
        order, ranks = torch.ops.pyfast.lsh_sort(buckets, 4)
        mask = torch.rand(2, n) < 0.7 if masked else None
        given = (
            buckets if choices.same_bucket else None,
            ranks if choices.correct_duplicates else None,
            mask,
        )
        rest = (None, 0.0, 16, 0.7, key_norm, wrap, True, choices.attend_self, choices.mask_queries)
        exact, lse = reference.lsh_attention_op(q, k if separate else None, v, order, *given, *rest)
        ours = lsh_decoding.attend_rows(
            rows,
            q[:, :, rows],
            lsh_decoding.SortedTokens(k if separate else q, v, order, ranks, buckets, mask),
            16,
            0.7,
            choices,
        )
        torch.testing.assert_close(ours, exact[:, :, rows], rtol=1e-11, atol=1e-12)
        lonely = lse[:, :, rows] == -torch.inf
        assert torch.equal(ours[lonely], v.repeat_interleave(2, dim=1)[:, :, rows][lonely])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_summed_in_float32(dtype, device):
    q, v = (torch.randn(1, 2, 80, 16, device=device).to(dtype) for _ in range(2))
    buckets = torch.randint(4, (1, 1, 2, 2, 80), dtype=torch.int32, device=device)
    order, ranks = torch.ops.pyfast.lsh_sort(buckets, 4)
    rows, rest = torch.arange(60, 80, device=device), (0.25, "rms", "rounds", True, False, False)
    torchs, exact = (
        reference.lsh_attention_op(
            q.to(t), None, v.to(t), order, None, None, None, None, 0.0, 16, *rest
        )[0]
        for t in (dtype, torch.float64)
    )
    tokens = lsh_decoding.SortedTokens(q, v, order, ranks, buckets, None)
    args = (rows, q[:, :, rows], tokens, 16, 0.25, lsh_options.LSHChoices())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = lsh_decoding.attend_rows(*args)
    assert_as_exact_as_torch(ours, torchs[:, :, rows], exact[:, :, rows])
