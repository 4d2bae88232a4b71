"""pyfast.lsh_attention and its definition: what a query sees, gradients, memory, compile, autocast, bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast import reference
from pyfast._support.measure import peak_bytes

PRESETS = list(pyfast.LSH_PRESETS)


def tensors(
    n=50,
    heads=2,
    dim=8,
    value_heads=None,
    value_dim=None,
    batch=2,
    device="cpu",
    dtype=torch.float32,
):
    value_heads, value_dim = value_heads or heads, value_dim or dim
    shapes = (
        (batch, heads, n, dim),
        (batch, value_heads, n, value_dim),
        (batch, value_heads, n, dim),
    )
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


# --- the definition itself, once more by hand ---


def windows(ids, c, wrap):
    """For every round and position, what it sees there: (round, position) pairs."""
    rounds, n = ids.shape
    orders = [sorted(range(n), key=lambda i: (ids[r, i].item(), i)) for r in range(rounds)]
    chunks = [[order[i : i + c] for i in range(0, n, c)] for order in orders]
    found = [[None] * n for _ in range(rounds)]
    for r, t in itertools.product(range(rounds), range(len(chunks[0]))):
        seen = [(r, j) for j in chunks[r][t]]
        before = {"rounds": (r - 1) % rounds, "round": r, "none": None}[wrap]
        if t > 0:
            seen += [(r, j) for j in chunks[r][t - 1]]
        elif before is not None and not (before == r and len(chunks[0]) == 1):
            seen += [(before, j) for j in chunks[before][-1]]
        for i in chunks[r][t]:
            found[r][i] = seen
    return found


def by_hand(q, v, ids, c, causal, mask, choices):
    """One head, float64, one query at a time; a list of (weight before softmax, key) and nothing else."""
    n, dim = q.shape
    scale = dim**-0.5 if choices.scale is None else choices.scale
    keys = {
        "rms": q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() / math.sqrt(dim),
        "l2": q / q.norm(dim=-1, keepdim=True),
        "none": q,
    }[choices.key_norm]
    seen, out = windows(ids, c, choices.wrap), []
    for i in range(n):
        multiset = []
        for r in range(len(ids)):
            for s, j in seen[r][i]:
                sees = (j != i or choices.attend_self) and (j <= i or not causal) and bool(mask[j])
                sees = sees and (bool(mask[i]) or not choices.mask_queries)
                if choices.same_bucket:
                    sees = sees and s == r and ids[r, i] == ids[r, j]
                multiset += [j] if sees else []
        if not multiset:
            out.append(v[i])
            continue
        weight = [1 / multiset.count(j) if choices.correct_duplicates else 1 for j in multiset]
        p = torch.tensor(weight, dtype=torch.float64) * (scale * keys[multiset] @ q[i]).exp()
        out.append(p @ v[multiset] / p.sum())
    return torch.stack(out)


@pytest.mark.parametrize("wrap", pyfast.reference.lsh_options.WRAPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [5, 16, 37, 70])
def test_the_definition(n, causal, wrap):
    q, v, _ = (t.detach().double() for t in tensors(n, heads=1, batch=1))
    mask = torch.rand(1, n) < 0.8
    for rounds, norm, flags in (
        (1, "rms", {}),
        (3, "l2", {"same_bucket": True}),
        (2, "none", {"correct_duplicates": True, "scale": 0.3}),
        (3, "rms", {"correct_duplicates": True, "same_bucket": True, "attend_self": True}),
        (2, "l2", {"mask_queries": True}),
    ):
        buckets = torch.randint(4, (1, 1, rounds, n), dtype=torch.int32)
        given = dict(causal=causal, key_padding_mask=mask, key_norm=norm, wrap=wrap, **flags)
        found = reference.lsh_attention(
            q, v, chunk_length=16, n_buckets=4, buckets=buckets, **given
        )
        choices = pyfast.reference.lsh_options.resolve(
            "trax", False, key_norm=norm, wrap=wrap, **flags
        )
        torch.testing.assert_close(
            found[0, 0], by_hand(q[0, 0], v[0, 0], buckets[0, 0], 16, causal, mask[0], choices)
        )


# --- the function ---


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("separate", [False, True])
def test_is_the_definition(device, preset, separate):
    """Hash, sort, attend, and every gradient."""
    qk, v, k = tensors(70, heads=4, value_heads=2, value_dim=6, device=device)
    mask = torch.rand(2, 70, device=device) < 0.9
    given = dict(
        k=k if separate else None, chunk_length=16, preset=preset, key_padding_mask=mask, n_hashes=3
    )
    given |= dict(seed=4, dropout_p=0.1, return_lse=True, return_buckets=True)
    results = []
    for function in (pyfast.lsh_attention, reference.lsh_attention):
        out, lse, buckets = function(qk, v, **given)
        finite = torch.where(lse.isfinite(), lse, 0)
        wanted = [qk, v, k] if separate else [qk, v]
        results.append(
            [
                out,
                finite,
                *torch.autograd.grad(out.square().sum() + finite.sin().sum(), wanted),
                buckets,
            ]
        )
    assert torch.equal(results[0].pop(), results[1].pop())
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


def test_one_chunk_is_exact_attention(device):
    """All see all: softmax over the other keys, whatever the buckets."""
    qk, v, _ = tensors(48, device=device)
    keys = F.normalize(qk, dim=-1) * math.sqrt(8)
    for causal in (True, False):
        seen = ~torch.eye(48, dtype=torch.bool, device=device)
        seen = seen.tril() if causal else seen
        exact = F.scaled_dot_product_attention(qk, keys, v, attn_mask=seen)
        found = pyfast.lsh_attention(
            qk, v, chunk_length=48, n_hashes=3, causal=causal, key_norm="l2"
        )
        if causal:
            exact[:, :, 0] = v[:, :, 0]
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_a_query_that_sees_nothing_has_its_own_value(device, dtype):
    qk, v, _ = tensors(40, device=device, dtype=dtype)
    out, lse = pyfast.lsh_attention(qk, v, chunk_length=16, return_lse=True, dropout_p=0.5)
    assert (
        torch.equal(out[:, :, 0], v[:, :, 0]) and (lse[:, :, 0] == -math.inf).all()
    )  # the first of a causal sequence
    assert lse[:, :, 1:].isfinite().any()
    nobody = torch.zeros(2, 40, dtype=torch.bool, device=device)
    for causal in (True, False):
        out = pyfast.lsh_attention(qk, v, chunk_length=16, causal=causal, key_padding_mask=nobody)
        assert torch.equal(out, v)
        dv = torch.randn_like(v)
        assert torch.equal(torch.autograd.grad(out, v, dv)[0], dv)
    assert torch.equal(pyfast.lsh_attention(qk[:, :, :1], v[:, :, :1]), v[:, :, :1])


def test_lengths_from_nothing(device):
    for n in (0, 1, 2, 63, 64, 65):
        qk, v, _ = tensors(n, device=device)
        out, lse, buckets = pyfast.lsh_attention(
            qk, v, n_hashes=2, return_lse=True, return_buckets=True
        )
        assert (
            out.shape == (2, 2, n, 8) and lse.shape == (2, 2, n) and buckets.shape == (2, 2, 2, n)
        )
        out.sum().backward()
        assert qk.grad.shape == qk.shape and v.grad.isfinite().all()
    qk, v, _ = tensors(5, batch=0, device=device)
    pyfast.lsh_attention(qk, v).sum().backward()
    assert qk.grad.shape == (0, 2, 5, 8)


def test_buckets_are_handed_on(device):
    """Nothing is hashed again, and n_hashes is theirs."""
    qk, v, _ = tensors(70, device=device)
    out, buckets = pyfast.lsh_attention(qk, v, n_hashes=3, chunk_length=16, return_buckets=True)
    assert torch.equal(out, pyfast.lsh_attention(qk, v, chunk_length=16, buckets=buckets))
    assert torch.equal(out, pyfast.lsh_attention(qk, v, chunk_length=16, buckets=buckets.long()))
    assert not torch.equal(
        out, pyfast.lsh_attention(qk, v, chunk_length=16, buckets=buckets[:, :, :2])
    )


def test_seeds(device):
    qk, v, _ = tensors(70, device=device)
    options = dict(chunk_length=16, dropout_p=0.2)
    by_seed = [
        pyfast.lsh_attention(qk, v, seed=seed, **options) for seed in (1, torch.tensor(1), 2)
    ]
    assert torch.equal(*by_seed[:2]) and not torch.equal(*by_seed[1:])
    by_torch = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        by_torch.append(pyfast.lsh_attention(qk, v, **options))
    assert torch.equal(*by_torch[:2]) and not torch.equal(*by_torch[1:])


def test_dropout_drops_its_share_and_keeps_the_mean(device):
    qk, v = torch.randn(1, 1, 64, 8, device=device) / 8, torch.ones(1, 1, 64, 8, device=device)
    buckets = torch.zeros(1, 1, 1, 64, dtype=torch.int32, device=device)
    kept = [
        pyfast.lsh_attention(qk, v, buckets=buckets, dropout_p=0.25, seed=s)[..., 0]
        for s in range(200)
    ]
    kept = torch.stack(kept)[..., 16:]  # sums of 16 to 63 weights each
    assert abs(kept.mean() - 1) < 0.01
    assert 0.005 < kept.var() < 0.03  # about (p / (1 - p)) / number of keys


# --- what is not finite, or nearly so ---


def test_masked_tokens_may_hold_anything(device):
    """As keys they are not touched; nor, if asked, as queries, whose slopes would else reach what they see."""
    qk, v, _ = tensors(70, device=device)
    mask = torch.rand(2, 70, device=device) < 0.7
    buckets = torch.randint(4, (2, 2, 2, 70), device=device)
    found = []
    for garbage in (0.0, math.nan, math.inf):
        given = [
            t.detach().masked_fill(~mask[:, None, :, None], garbage).requires_grad_()
            for t in (qk, v)
        ]
        for function in (pyfast.lsh_attention, reference.lsh_attention):
            options = dict(buckets=buckets, n_buckets=4, chunk_length=16, key_padding_mask=mask)
            plain, out = (
                function(*given, mask_queries=hidden, **options) for hidden in (False, True)
            )
            grads = torch.autograd.grad(out[mask[:, None].expand(2, 2, 70)].square().sum(), given)
            found.append([t[mask[:, None].expand(2, 2, 70)] for t in (plain, out, *grads)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_any_byte_of_a_mask_is_true():
    qk, v, _ = tensors(64)
    mask = torch.full((2, 64), 255, dtype=torch.uint8).view(torch.bool)
    found = [
        pyfast.lsh_attention(qk, v, chunk_length=16, seed=1, key_padding_mask=m)
        for m in (mask, None)
    ]
    assert torch.equal(*found)


def test_every_nan_stays_one(device):
    qk, v, _ = (t.detach() for t in tensors(40, device=device))
    for bits in (0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1):
        qk[0, 0, 20] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        out, lse = pyfast.lsh_attention(qk, v, n_buckets=2, return_lse=True)
        assert out[0, 0, 20].isnan().all() and lse[0, 0, 20].isnan() and out[0, 1].isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e8, 1e18])
def test_large_scores(device, size):
    """Their rounding makes weights uncertain, not larger than 1."""
    qk, v, _ = tensors(300, dim=64, device=device)
    grads = torch.autograd.grad(pyfast.lsh_attention(qk * size, v, key_norm="l2").sum(), [qk, v])
    assert all(g.isfinite().all() for g in grads) and grads[1].abs().max() <= 300 * 4 + 1
    qk, v = (torch.tensor(x, device=device).view(1, 1, 2, 1) for x in ([1e16, -1e16], [1.0, 2.0]))
    assert torch.equal(
        pyfast.lsh_attention(qk, v, causal=False, key_norm="none"), v.flip(2)
    )  # -1e32 is a score, too


@pytest.mark.parametrize("preset", PRESETS)
def test_gradcheck(preset):
    qk, v, k = tensors(20, heads=2, dim=3, value_heads=1, batch=1, dtype=torch.float64)
    buckets = torch.randint(2, (2, 1, 2, 2, 20))
    given = dict(
        chunk_length=16, n_buckets=2, preset=preset, dropout_p=0.2, seed=1, return_lse=True
    )

    def finite(outs):
        return outs[0], torch.where(outs[1].isfinite(), outs[1], 0)

    shared = lambda qk, v: finite(pyfast.lsh_attention(qk, v, buckets=buckets[0], **given))  # noqa: E731
    assert torch.autograd.gradcheck(shared, (qk, v), fast_mode=True)
    separate = lambda qk, v, k: finite(pyfast.lsh_attention(qk, v, k=k, buckets=buckets, **given))  # noqa: E731
    assert torch.autograd.gradcheck(separate, (qk, v, k), fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(device, dynamic):
    def step(qk, v, mask):
        out, lse = pyfast.lsh_attention(
            qk.relu(),
            v,
            chunk_length=16,
            n_hashes=2,
            seed=3,
            dropout_p=0.1,
            key_padding_mask=mask,
            return_lse=True,
        )
        return out.sin(), lse

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (40, 70):
        qk, v, _ = tensors(n, device=device)
        mask = torch.rand(2, n, device=device) < 0.9
        results = []
        for function in (step, compiled):
            out, lse = function(qk, v, mask)
            results.append([out, lse, *torch.autograd.grad(out.square().sum(), [qk, v])])
        torch.testing.assert_close(*results)


def test_one_graph_for_many_lengths(device):
    """Where n_buckets is given: the default depends on the length."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    attend = lambda qk, v: pyfast.lsh_attention(qk, v, chunk_length=16, n_buckets=4)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for n in range(40, 150, 10):
        compiled(*tensors(n, device=device)[:2])
    assert len(graphs) == 1


def test_compiles_with_torch_s_seeds(device):
    qk, v, _ = tensors(70, device=device)
    compiled = torch.compile(
        lambda qk, v: pyfast.lsh_attention(qk, v, chunk_length=16, dropout_p=0.1), fullgraph=True
    )
    assert not torch.equal(compiled(qk, v), compiled(qk, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    qk, v, _ = tensors(70, device=device)
    with torch.autocast(device.type, dtype=dtype):
        out = pyfast.lsh_attention(qk, v, chunk_length=16, seed=1)
        with torch.autocast(device.type, enabled=False):
            assert pyfast.lsh_attention(qk, v, chunk_length=16).dtype == torch.float32
    assert out.dtype == dtype
    assert torch.equal(
        out, pyfast.lsh_attention(qk.to(dtype), v.to(dtype), chunk_length=16, seed=1)
    )
    out.float().sum().backward()
    assert qk.grad.dtype == v.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device, reentrant):
    """Rotations and dropout come again from torch's generator, whose state checkpointing restores."""
    qk, v, _ = tensors(70, device=device)
    attend = lambda qk, v: pyfast.lsh_attention(qk, v, chunk_length=16, dropout_p=0.1)  # noqa: E731
    grads = []
    for call in (attend, lambda qk, v: checkpoint(attend, qk, v, use_reentrant=reentrant)):
        torch.manual_seed(5)
        grads.append(
            torch.autograd.grad(call(qk, v).square().sum(), [qk, v])
            if not reentrant
            else backward(call, qk, v)
        )
    assert all(map(torch.equal, *grads))


def backward(call, *inputs):
    for t in inputs:
        t.grad = None
    call(*inputs).square().sum().backward()
    return [t.grad for t in inputs]


def test_second_derivative_and_forward_mode_are_refused(device):
    qk, v, _ = tensors(40, device=device)
    with (
        pytest.raises((RuntimeError, NotImplementedError), match="forward"),
        forward_ad.dual_level(),
    ):
        pyfast.lsh_attention(forward_ad.make_dual(qk, torch.ones_like(qk)), v)
    qk, v, _ = tensors(40, device=device)
    (dqk,) = torch.autograd.grad(pyfast.lsh_attention(qk, v).square().sum(), qk, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dqk.sum().backward()


def test_frozen_inputs_get_no_gradient(device):
    qk, v, _ = tensors(70, device=device)
    for frozen, live in ((qk, v), (v, qk)):
        frozen.requires_grad_(False)
        out = pyfast.lsh_attention(qk, v, chunk_length=16, seed=1)
        assert torch.equal(
            torch.autograd.grad(out.sum(), live)[0], expected_gradient(live is qk, qk, v)
        )
        frozen.requires_grad_(True)


def expected_gradient(of_qk, qk, v):
    both = [t.detach().requires_grad_() for t in (qk, v)]
    return torch.autograd.grad(pyfast.lsh_attention(*both, chunk_length=16, seed=1).sum(), both)[
        0 if of_qk else 1
    ]


# --- memory ---


def test_saves_less_than_half_a_kilobyte_a_token_and_head(device):
    qk, v, _ = tensors(256, heads=2, dim=64, device=device, dtype=torch.bfloat16)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = pyfast.lsh_attention(qk, v, n_hashes=4)
    tokens = 2 * 2 * 256
    assert out.untyped_storage().data_ptr() in saved
    assert sum(saved.values()) / tokens <= 0.45 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_linear_and_knows_no_rounds(dtype):
    """Beside the permutations: int32 ids, order and ranks."""

    def peak(n, rounds):
        qk, v, _ = tensors(n, heads=1, dim=64, batch=1, dtype=dtype)
        dout = torch.randn_like(v)
        step = lambda: pyfast.lsh_attention(qk, v, n_hashes=rounds, seed=1).backward(dout)  # noqa: E731
        return peak_bytes(step) - 3 * 4 * n * rounds

    base = peak(8192, 1)
    assert peak(8192, 8) <= 1.05 * base + (1 << 16)
    assert 1.6 * base < peak(16384, 1) <= 2.1 * base


# --- bad input ---

Q, V = torch.randn(2, 4, 20, 8), torch.randn(2, 4, 20, 8)
IDS = torch.zeros(2, 4, 2, 20, dtype=torch.int32)
ROTATIONS = torch.randn(8, 2, 2)
BAD = {
    "qk not a tensor": (lambda: attend([1.0]), TypeError, "qk must be a torch.Tensor, not list"),
    "qk of ints": (
        lambda: attend(Q.int()),
        TypeError,
        "qk is torch.int32; it must be torch.float32",
    ),
    "qk 3-D": (
        lambda: attend(Q[0]),
        ValueError,
        r"qk has shape \[4, 20, 8\]; it must be \[batch, heads, length, dim\]",
    ),
    "dim 0": (lambda: attend(Q[..., :0]), ValueError, "dim 1 to 256"),
    "dim 257": (lambda: attend(torch.randn(1, 1, 4, 257)), ValueError, "dim 1 to 256"),
    "v's length": (
        lambda: attend(Q, V[:, :, 1:]),
        ValueError,
        r"v has shape \[2, 4, 19, 8\]; it must be \[2, 4, 20, 8\]",
    ),
    "v's heads": (
        lambda: attend(Q, V[:, :3]),
        ValueError,
        "v has 3 heads; it must have a divisor of qk's 4",
    ),
    "v's dtype": (
        lambda: attend(Q, V.half()),
        TypeError,
        "v is torch.float16 but qk is torch.float32",
    ),
    "k's width": (lambda: attend(k=V[..., :5]), ValueError, r"k has shape \[2, 4, 20, 5\]"),
    "k's heads": (
        lambda: attend(k=V[:, :2]),
        ValueError,
        "k has 2 heads; it must have as many as v, 4",
    ),
    "chunk 15": (
        lambda: attend(chunk_length=15),
        ValueError,
        "chunk_length is 15; it must be a multiple of 16",
    ),
    "chunk 512": (lambda: attend(chunk_length=512), ValueError, "chunk_length is 512"),
    "chunk a float": (lambda: attend(chunk_length=64.5), ValueError, "chunk_length is 64.5"),
    "v's heads, none of qk's": (
        lambda: attend(Q[:, :0], V[:, :2]),
        ValueError,
        "v has 2 heads; it must have a divisor of qk's 0",
    ),
    "both buckets and rotations": (
        lambda: attend(buckets=IDS, rotations=ROTATIONS),
        ValueError,
        "buckets and rotations are given; they must not be both",
    ),
    "no rounds": (
        lambda: attend(n_hashes=0),
        ValueError,
        "n_hashes is 0; it must be an integer, 1 or more",
    ),
    "half a round": (lambda: attend(n_hashes=1.5), ValueError, "n_hashes is 1.5"),
    "odd buckets": (lambda: attend(n_buckets=5), ValueError, "n_buckets is 5; it must be even"),
    "no buckets": (lambda: attend(n_buckets=0), ValueError, "n_buckets is 0"),
    "odd factor": (lambda: attend(n_buckets=(4, 3)), ValueError, r"n_buckets is \(4, 3\)"),
    "buckets a string": (lambda: attend(n_buckets="8"), TypeError, "n_buckets is '8'"),
    "preset": (
        lambda: attend(preset="google"),
        ValueError,
        "preset is 'google'; it must be 'trax', 'hf'",
    ),
    "key_norm": (
        lambda: attend(key_norm="l1"),
        ValueError,
        "key_norm is 'l1'; it must be 'rms', 'l2', 'none'",
    ),
    "wrap": (
        lambda: attend(wrap=True),
        ValueError,
        "wrap is True; it must be 'rounds', 'round', 'none'",
    ),
    "scale": (
        lambda: attend(scale=math.nan),
        ValueError,
        "scale is nan; it must be a finite number",
    ),
    "same_bucket": (
        lambda: attend(same_bucket=1),
        TypeError,
        "same_bucket is 1; it must be True or False",
    ),
    "mask's shape": (
        lambda: attend(key_padding_mask=torch.ones(2, 19, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask has shape \[2, 19\]; it must be \[2, 20\]",
    ),
    "mask's dtype": (
        lambda: attend(key_padding_mask=torch.ones(2, 20)),
        TypeError,
        "key_padding_mask is torch.float32",
    ),
    "dropout 1": (
        lambda: attend(dropout_p=1.0),
        ValueError,
        "dropout_p is 1.0; it must be a number from 0 up to, but not including, 1",
    ),
    "dropout a string": (
        lambda: attend(dropout_p="0.1"),
        ValueError,
        "dropout_p is .*; it must be a number from 0",
    ),
    "seed": (
        lambda: attend(seed=1.5),
        TypeError,
        "seed must be an int or an int64 tensor, not float",
    ),
    "big seed": (lambda: attend(seed=2**65), ValueError, "it must fit in 64 bits"),
    "ids of another length": (
        lambda: attend(buckets=IDS[..., 1:]),
        ValueError,
        r"buckets has shape \[2, 4, 2, 19\]",
    ),
    "ids of other rounds": (
        lambda: attend(buckets=IDS, n_hashes=3),
        ValueError,
        r"it must be \[2, 4, 3, 20\]",
    ),
    "ids of no round": (lambda: attend(buckets=IDS[:, :, :0]), ValueError, "buckets has shape"),
    "ids for k": (lambda: attend(k=V, buckets=IDS), ValueError, r"it must be \[2, 2, 4, 2, 20\]"),
    "ids as floats": (lambda: attend(buckets=IDS.float()), TypeError, "buckets is torch.float32"),
    "ids too high": (
        lambda: attend(buckets=IDS + 9),
        ValueError,
        "ids from 9 to 9; they must be 0 to 2",
    ),
    "ids negative": (lambda: attend(buckets=IDS - 1), ValueError, "ids from -1 to -1"),
    "rotations' shape": (
        lambda: attend(rotations=ROTATIONS, n_buckets=8),
        ValueError,
        r"rotations has shape \[8, 2, 2\]; it must be \[\(batch,\) \(heads,\) 8, 2, 4\]",
    ),
    "rotations' rounds": (
        lambda: attend(rotations=ROTATIONS, n_hashes=3, n_buckets=4),
        ValueError,
        "n_hashes, 3",
    ),
    "rotations 2-D": (
        lambda: attend(rotations=ROTATIONS[0]),
        ValueError,
        r"rotations has shape \[2, 2\]",
    ),
    "rotations NaN": (
        lambda: attend(rotations=ROTATIONS * math.nan, n_buckets=4),
        ValueError,
        "rotations holds NaN",
    ),
    "lsh_buckets, 3-D": (lambda: pyfast.lsh_buckets(Q[0], n_buckets=4), ValueError, "qk has shape"),
    "lsh_buckets, odd": (
        lambda: pyfast.lsh_buckets(Q, n_buckets=3),
        ValueError,
        "n_buckets is 3; it must be even",
    ),
}


def attend(qk=Q, v=V, **options):
    return pyfast.lsh_attention(qk, v, **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
