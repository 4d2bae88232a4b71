"""The Triton kernels of LSH attention against the definition in plain PyTorch.

test_nf4_triton.py says how and where they run.
"""

import itertools

import pytest
import torch
from helpers.tolerance import FLOOR
from helpers.triton_inputs import DEVICE, DTYPES, GPU, native
from helpers.triton_interpreter import assert_passes
from torch.utils._pytree import tree_map_only

from pyfast import reference
from pyfast._support import registry
from pyfast.kernels import lsh_attention as forward
from pyfast.kernels import lsh_attention_backward as backward
from pyfast.kernels import lsh_hash as hashing


@pytest.mark.long
@pytest.mark.needs("no kernels")
@pytest.mark.parametrize("chosen", ["pairs", "not pairs"])
def test_the_kernels_are_right_in_the_interpreter(chosen):
    assert_passes("kernels/test_lsh_triton.py", chosen)


# ---------------------------------------------------------------- hashing


@native
@pytest.mark.parametrize("seed", [0, -77889900112233, 2**63 - 1])
@pytest.mark.parametrize("shape", [(3, 5, 2, 7), (1100,), (0, 4)], ids=str)
def test_rotations_equal_the_reference(shape, seed):
    rotations = hashing.rotations(torch.tensor(seed, device=DEVICE), shape).cpu()
    expected = reference.lsh_rotations_op(torch.tensor(seed), shape)
    torch.testing.assert_close(rotations, expected, rtol=1e-6, atol=1e-7)


def ids(x, rotations, factors):
    """Return the kernel's ids, which differ from the definition's only within rounding."""
    rotations = rotations.expand(*x.shape[:2], -1, -1, -1)
    buckets = hashing.hash_tokens(x, rotations, factors)
    assert buckets.dtype == torch.int32
    assert buckets.shape == (*x.shape[:2], rotations.shape[3], x.shape[2])
    wrong = buckets != reference.lsh_hash_op(x, rotations, factors)
    if wrong.any():
        rotated = torch.einsum("bhnd,bhdrw->bhrnw", x.double(), rotations.double())
        for part in rotated.split([f // 2 for f in factors], -1):
            best = torch.cat([part, -part], -1).topk(2).values
            wrong &= (best[..., 0] - best[..., 1]) > 1e-5 * best[..., 0]
        assert not wrong.any()
    return buckets


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [[2], [8], [64, 6], [100], [4, 2, 6]], ids=str)
def test_hashes_equal_the_reference(factors, dtype):
    x = torch.randn(2, 2, 37, 20, device=DEVICE).to(dtype)
    ids(x, torch.randn(1, 2, 20, 3, sum(factors) // 2, device=DEVICE), factors)


@native
def test_hashes_of_many_columns_and_few_tokens_are_right():
    for shape in ((1, 1, 1, 300), (1, 2, 0, 16), (0, 2, 5, 16)):
        x = torch.randn(shape, device=DEVICE).half()
        ids(x, torch.randn(1, 1, shape[-1], 2, 4, device=DEVICE), [8])


@native
def test_ties_go_to_the_first_direction():
    """Directions come before opposites. Zeros and NaN get ids that exist."""
    rotations = torch.ones(1, 1, 4, 1, 50, device=DEVICE)
    rotations[..., 0], rotations[..., 3] = 0.5, -1.0
    for x in (torch.ones(1, 1, 3, 4), -torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)):
        x = x.to(DEVICE)
        assert torch.equal(ids(x, rotations, [100]), reference.lsh_hash_op(x, rotations, [100]))
    buckets = hashing.hash_tokens(x * float("nan"), rotations, [100])
    assert (buckets >= 0).all() and (buckets < 100).all()


@native
@pytest.mark.parametrize("n_buckets", [1, 2, 7, 256, 257, 2**20])
@pytest.mark.parametrize("n", [1, 50, 256, 600])
def test_sort_equals_the_reference(n, n_buckets):
    buckets = torch.randint(n_buckets, (2, 1, n), dtype=torch.int32, device=DEVICE)
    order, ranks = hashing.sort(buckets, n_buckets)
    exact = reference.lsh_sort_op(buckets, n_buckets)
    assert torch.equal(order, exact[0]) and torch.equal(ranks, exact[1])


@native
def test_nothing_is_sorted_to_nothing():
    for shape in ((3, 0), (0, 5)):
        buckets = torch.empty(shape, dtype=torch.int32, device=DEVICE)
        assert [t.shape for t in hashing.sort(buckets, 4)] == [shape] * 2


# ---------------------------------------------------------------- attention


def problem(
    dtype=torch.float32,
    *,
    batch=1,
    heads=2,
    k_heads=None,
    v_heads=2,
    n=50,
    d=16,
    e=16,
    rounds=2,
    c=16,
    n_buckets=6,
    own_keys=False,
    same_bucket=False,
    duplicates=False,
    masked=False,
    mask_queries=False,
    p=0.0,
    scale=0.7,
    key_norm="rms",
    wrap="rounds",
    causal=True,
    attend_self=False,
):
    """Return the arguments of lsh_attention."""

    def random(heads, width):
        return torch.randn(batch, heads, n, width, device=DEVICE).to(dtype)

    q, v = random(heads, d), random(v_heads, e)
    k = random(k_heads or v_heads, d) if own_keys else None
    shape = (1 + own_keys, batch, heads, rounds, n)
    buckets = torch.randint(n_buckets, shape, dtype=torch.int32, device=DEVICE)
    order, ranks = (t.to(DEVICE) for t in reference.lsh_sort_op(buckets, n_buckets))
    mask = torch.rand(batch, n, device=DEVICE) < 0.6 if masked else None
    optional = (buckets if same_bucket else None, ranks if duplicates else None, mask)
    seed = torch.tensor(-12345678901, device=DEVICE) if p else None
    return (
        q,
        k,
        v,
        order,
        *optional,
        seed,
        p,
        c,
        scale,
        key_norm,
        wrap,
        causal,
        attend_self,
        mask_queries,
    )


def double(args):
    return [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args
    ]


def assert_close(result, exact, dtype):
    """Assert that a result is close to the exact one.

    Weights and gradients are rounded to the inputs' type on their way to the tensor cores, and so
    is the result.
    """
    assert result.shape == exact.shape
    if exact.numel():
        error = (result.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-3)
        assert error <= 4 * torch.finfo(dtype).eps + FLOOR[torch.float32], error


def compare(args, needs=None, dlse=True, again=False):
    """Assert that values, lse and gradients are right, and have the same bits `again`.

    Return which queries are lonely: they see no key.
    """
    q, k, v = args[:3]
    out, lse = forward.lsh_attention(*args)
    exact, exact_lse = reference.lsh_attention_op(*double(args))
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert_close(out, exact, q.dtype)
    lonely = exact_lse.isinf()
    assert torch.equal(lse.isinf(), lonely)
    assert_close(lse.masked_fill(lonely, 0), exact_lse.masked_fill(lonely, 0), torch.float32)
    values = v.repeat_interleave(q.shape[1] // max(v.shape[1], 1), dim=1)
    assert torch.equal(out[lonely], values[lonely])
    needs = needs or [True, k is not None, True]
    dout = torch.randn(out.shape, device=DEVICE).to(q.dtype)
    dlse = torch.randn(lse.shape, device=DEVICE) if dlse else None
    backward_args = (dout, dlse, q, k, v, out, lse, *args[3:], needs)
    grads = backward.lsh_attention_backward(*backward_args)
    for grad, true, x in zip(
        grads, reference.lsh_attention_backward_op(*double(backward_args)), (q, k, v), strict=True
    ):
        assert grad.dtype == q.dtype and (x is None or grad.shape in (x.shape, (0,)))
        assert_close(grad, true, q.dtype)
    if GPU or again:
        assert all(map(torch.equal, forward.lsh_attention(*args), (out, lse)))
        assert all(map(torch.equal, backward.lsh_attention_backward(*backward_args), grads))
    return lonely


# Every two of these are tested together. On a GPU, where each pair is compiled anew, a fourth of
# the pairs is.
OPTIONS = {
    "values keys": dict(own_keys=True, v_heads=1),
    "grouped values": dict(v_heads=1),
    "same bucket": dict(same_bucket=True),
    "duplicates": dict(duplicates=True),
    "mask": dict(masked=True),
    "mask queries": dict(masked=True, mask_queries=True),
    "dropout": dict(p=0.3),
    "all directions": dict(causal=False),
    "self": dict(attend_self=True),
    "l2": dict(key_norm="l2"),
    "no norm": dict(key_norm="none", scale=0.3),
    "e": dict(d=12, e=24),
    "fp16": dict(dtype=torch.float16),
}


@native
@pytest.mark.parametrize(
    "pair", list(itertools.combinations(OPTIONS, 2))[:: 4 if GPU else 1], ids=" + ".join
)
def test_pairs_of_options_are_right(pair):
    options = OPTIONS[pair[0]] | OPTIONS[pair[1]]
    wrap = ("rounds", "round", "none")[sum(map(len, pair)) % 3]
    compare(problem(n=21, wrap=wrap, **options))


@native
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("wrap", ["rounds", "round", "none"])
def test_every_wrap_is_right(wrap, rounds):
    """There is one chunk, or two, or a short last one.

    A first chunk may see by wrapping what it sees anyhow.
    """
    for n, same_bucket in ((15, False), (15, True), (37, True), (37, False)):
        compare(
            problem(
                n=n,
                heads=1,
                v_heads=1,
                wrap=wrap,
                rounds=rounds,
                duplicates=True,
                same_bucket=same_bucket,
                p=0.2,
            )
        )


@native
@pytest.mark.parametrize("n", [1, 15, 16, 17])
def test_short_sequences_are_right(n):
    lonely = compare(problem(n=n, batch=2), dlse=n != 16, again=n == 17)
    # The first token at least is lonely.
    assert lonely.any()


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [32, 48])
def test_chunks_of_several_tiles_are_right(c, dtype):
    compare(
        problem(
            dtype,
            n=c + 20,
            heads=1,
            v_heads=1,
            c=c,
            d=32,
            e=5,
            p=0.2,
            duplicates=dtype != DTYPES[0],
        )
    )


@native
def test_wide_heads_take_two_passes():
    compare(problem(torch.float16, n=20, heads=1, v_heads=1, d=129, rounds=1))


@native
def test_keys_and_values_may_have_groups_of_their_own():
    """Keys and values have different numbers of heads."""
    compare(problem(heads=4, k_heads=2, v_heads=1, own_keys=True, n=17, attend_self=True))


@native
@pytest.mark.parametrize("own_keys", [False, True])
def test_only_needed_gradients_are_computed(own_keys):
    args = problem(n=17, own_keys=own_keys, v_heads=1, rounds=1, p=0.1)
    for needs in itertools.product((False, True), repeat=3):
        if needs[1] <= own_keys:
            compare(args, list(needs))


@native
def test_lonely_queries_give_their_values():
    """All tokens are masked, so the values are the results, and the gradients are theirs."""
    args = list(problem(masked=True, mask_queries=True))
    args[6] = torch.zeros_like(args[6])
    out, lse = forward.lsh_attention(*args)
    dout = torch.randn_like(out)
    grads = backward.lsh_attention_backward(
        dout, None, *args[:3], out, lse, *args[3:], [True, False, True]
    )
    assert torch.equal(out, args[2]) and (lse == -torch.inf).all()
    assert torch.equal(grads[2], dout) and not grads[0].any()


@native
def test_the_gradient_of_a_lonely_query_s_lse_is_ignored():
    """That lse is -inf, and a gradient of it, such as that of a weight made of it, may be NaN."""
    args = problem()
    out, lse = forward.lsh_attention(*args)
    lonely = lse == -torch.inf
    dlse = torch.where(lonely, torch.nan, 0)
    rest = (*args[:3], out, lse, *args[3:], [True, False, True])
    dout = torch.randn_like(out)
    grads = backward.lsh_attention_backward(dout, dlse, *rest)
    expected = backward.lsh_attention_backward(dout, None, *rest)
    assert lonely.any() and all(map(torch.equal, grads[::2], expected[::2]))


@native
def test_masked_tokens_may_hold_anything():
    args = list(problem(masked=True, mask_queries=True))
    mask, dout = args[6], torch.randn_like(args[2])
    outcomes = []
    for garbage in (0.0, torch.nan):
        some = [
            t.masked_fill(~mask[:, None, :, None], garbage) if t is not None else None
            for t in args[:3]
        ]
        out, lse = forward.lsh_attention(*some, *args[3:])
        d = dout * mask[:, None, :, None]
        grads = backward.lsh_attention_backward(
            d, None, *some, out, lse, *args[3:], [True, False, True]
        )
        outcomes.append([t * 1 for t in (out, *grads[::2])])
    seen = mask[:, None].expand_as(lse)
    assert (~mask).any() and all(torch.equal(a[seen], b[seen]) for a, b in zip(*outcomes))


def by_tokens(x):
    """Return x with the heads of a token side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def in_projection(x):
    """Return x as one of the parts of a projection to queries, keys and values."""
    return torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)


def results(args, dout):
    """Return the results of forward and backward, with lse as its own gradient."""
    q, k, v, *rest = args
    out, lse = forward.lsh_attention(q, k, v, *rest)
    return (
        out,
        lse,
        *backward.lsh_attention_backward(
            dout, lse, q, k, v, out, lse, *rest, [True, k is not None, True]
        ),
    )


@native
@pytest.mark.parametrize(
    "options",
    [
        dict(dtype=torch.float16, batch=2, v_heads=1),
        dict(),
        dict(own_keys=True, k_heads=1, rounds=1),
    ],
    ids=str,
)
def test_every_layout_gives_the_same_bits(options):
    """Results are laid out as their inputs are, by tokens or by heads."""
    args = problem(n=15, d=12, e=24, **options)
    q, k, v, *rest = args
    dout = torch.randn(*q.shape[:3], v.shape[3], device=DEVICE).to(q.dtype)
    expected = results(args, dout)
    for lay_dout, *lay in (
        (by_tokens, by_tokens, by_tokens, by_tokens),
        (torch.clone, by_tokens, in_projection, torch.clone),
        (by_tokens, in_projection, torch.clone, in_projection),
    ):
        some = [t if t is None else lay_t(t) for lay_t, t in zip(lay, (q, k, v))]
        out, lse, *grads = tensors = results((*some, *rest), lay_dout(dout))
        assert all(map(torch.equal, tensors, expected)) and lse.is_contiguous()
        for result, like in zip((out, *grads), (some[0], *some), strict=True):
            tokens = like is not None and like.stride(1) < like.stride(2)
            assert (result.transpose(1, 2) if tokens else result).is_contiguous()


@native
def test_ops_take_rows_with_gaps():
    """A view by columns and the gradient of a sum are copied; results are laid out as they were."""
    q, _, v, *rest = problem(n=15, rounds=1)
    q_columns, v_columns = (
        q.mT.contiguous().mT,
        v.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    )
    dout = torch.ones((), device=DEVICE).expand(v.shape)
    args = q_columns, None, v_columns, *rest
    out, lse = registry.run_kernel("lsh_attention", *args)
    backward_args = (dout, lse, *args[:3], out, lse, *rest, [True, False, True])
    tensors = out, lse, *registry.run_kernel("lsh_attention_backward", *backward_args)
    assert all(map(torch.equal, tensors, results((q, None, v, *rest), dout.contiguous())))
    args, backward_args = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, backward_args))
    fakes = (
        *torch.ops.pyfast.lsh_attention(*args),
        *torch.ops.pyfast.lsh_attention_backward(*backward_args),
    )
    assert [t.stride() for t in tensors] == [t.stride() for t in fakes]


@native
def test_rows_may_lie_far_apart():
    """The rows are more than 2^31 elements apart, in memory that is hardly touched."""
    args = problem(torch.float16, batch=2, n=17, heads=1, v_heads=1, rounds=1)
    q, _, v, *rest = args
    far = torch.empty(2**31 + 2**27, dtype=q.dtype, device=DEVICE)
    far_q = far[:-64].as_strided(q.shape, (32, 0, 2**27, 1)).copy_(q)
    far_v = far[64:].as_strided(v.shape, (2**31, 0, 64, 1)).copy_(v)
    dout = torch.randn_like(v)
    assert all(map(torch.equal, results((far_q, None, far_v, *rest), dout), results(args, dout)))


@native
def test_no_tokens_give_empty_results():
    for shape in (dict(n=0), dict(batch=0)):
        q, k, v, *rest = problem(own_keys=True, **shape)
        out, lse = forward.lsh_attention(q, k, v, *rest)
        grads = backward.lsh_attention_backward(out, lse, q, k, v, out, lse, *rest, [True] * 3)
        assert out.shape == v.shape and lse.shape == q.shape[:3]
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@native
def test_zero_keys_stay_finite():
    q, _, v, *rest = problem(torch.float16, key_norm="l2")
    q[:, :, ::2] = 0
    out, lse = forward.lsh_attention(q, None, v, *rest)
    needs = [False, False, True]
    grads = backward.lsh_attention_backward(
        torch.ones_like(out), None, q, None, v, out, lse, *rest, needs
    )
    assert out.isfinite().all() and grads[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tiles_of_every_size_divide_its_chunks(dtype):
    for kernel, heavy in itertools.product(("attention", "queries", "keys"), (False, True)):
        for c, d in itertools.product(range(16, 257, 16), (16, 32, 64, 128, 256)):
            config = forward.tile_config(kernel, c, d, dtype, heavy)
            assert (
                c % config["BM"] == c % config["BN"] == 0 and min(config["BM"], config["BN"]) >= 16
            )
