"""Local attention, its module and its cache, against plain attention under a mask."""

import pytest
import torch
from helpers.tolerance import assert_as_exact_as_torch
from torch.nn import functional as F

import pyfast
from pyfast.nn import rotary


def visible(n, chunk, mask=None):
    """[(batch,) n, n]: whether a query sees a key."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = (j <= i) & (j // chunk >= i // chunk - 1)
    return seen if mask is None else (seen & mask[:, None, :])[:, None]


def plain(q, k, v, chunk, mask=None):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible(q.shape[2], chunk, mask).to(q.device)
    )


def some(n, dim=24, v_dim=40, heads=4, kv_heads=4, device="cpu", dtype=torch.float32):
    shapes = ((2, heads, n, dim), (2, kv_heads, n, dim), (2, kv_heads, n, v_dim))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "n, chunk, kv_heads", [(2, 16, 4), (15, 16, 4), (100, 16, 2), (128, 64, 1), (97, 48, 4)]
)
def test_values_and_gradients(device, n, chunk, kv_heads, dtype):
    tensors = some(n, kv_heads=kv_heads, device=device, dtype=dtype)
    dout = torch.randn(2, 4, n, 40, device=device).to(dtype)

    def run(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    found = run(lambda *t: pyfast.local_attention(*t, chunk_length=chunk), tensors)
    torchs = run(lambda *t: plain(*t, chunk), tensors)
    exact = run(lambda *t: plain(*t, chunk), [t.double() for t in tensors])
    for ours, theirs, truth in zip(found, torchs, exact):
        assert_as_exact_as_torch(ours, theirs, truth)


def test_masked_keys_are_not_seen(device):
    q, k, v = some(70, device=device)
    mask = torch.rand(2, 70, device=device) < 0.7
    mask[:, ::16] = True  # a query that sees nothing has its own value
    found = pyfast.local_attention(q, k, v, chunk_length=16, key_padding_mask=mask)
    assert (found - plain(q, k, v, 16, mask.cpu())).abs().max() < 1e-5
    changed = pyfast.local_attention(
        q, k, v.masked_fill(~mask[:, None, :, None], 9.0), chunk_length=16, key_padding_mask=mask
    )
    kept = mask[:, None, :, None].expand_as(found)
    assert torch.equal(changed[kept], found[kept])


def test_empty(device):
    for q, k, v in (some(0, device=device), [t[:0] for t in some(9, device=device)]):
        assert pyfast.local_attention(q, k, v).shape == (*q.shape[:3], 40)


def test_dropout_is_the_seed_s(device):
    q, k, v = some(64, device=device)
    once, again, other = (
        pyfast.local_attention(q, k, v, dropout_p=0.5, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(once, again) and not torch.equal(once, other)
    mean = (
        sum(pyfast.local_attention(q, k, v, dropout_p=0.5, seed=seed) for seed in range(400)) / 400
    )
    assert (mean - pyfast.local_attention(q, k, v)).abs().mean() < 0.1


def test_compiles_whole(device):
    q, k, v = (t.requires_grad_() for t in some(50, device=device))
    compiled = torch.compile(pyfast.local_attention, fullgraph=True)
    assert torch.equal(
        compiled(q, k, v, chunk_length=16), pyfast.local_attention(q, k, v, chunk_length=16)
    )


# --- the module ---


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("steps", [[1] * 40, [33, 1, 1, 5], [7, 16, 16, 1], [40]], ids=str)
def test_steps_with_a_cache_are_the_whole(steps, turns):
    layer = pyfast.LocalSelfAttention(24, 3, chunk_length=16, bias=True).eval()
    x, mask = torch.randn(2, 40, 24), torch.rand(2, 40) < 0.8
    whole = layer(
        x, key_padding_mask=mask, rotary=rotary.tables(0, 40, 8, x.device) if turns else None
    )
    cache, first, found = pyfast.LocalCache(), 0, []
    for size in steps:
        some = slice(first, first + size)
        tables = rotary.tables(first, size, 8, x.device) if turns else None
        found.append(layer(x[:, some], key_padding_mask=mask[:, some], rotary=tables, cache=cache))
        first += size
    seen = mask.clone()
    found = torch.cat(found, 1)
    assert (found - whole)[seen].abs().max() < 1e-5
    assert cache.length == 40 and cache.held["k"].shape[2] <= 2 * 16


def test_a_reordered_cache_goes_on_as_the_other_example():
    layer = pyfast.LocalSelfAttention(24, 3, chunk_length=16).eval()
    x = torch.randn(2, 21, 24)
    cache = pyfast.LocalCache()
    layer(x[:, :20], cache=cache)
    cache.reorder(torch.tensor([1, 1, 0]))
    found = layer(x[[1, 1, 0], 20:], cache=cache)
    assert (found - layer(x)[[1, 1, 0], 20:]).abs().max() < 1e-5


def test_a_layer_without_a_mask_is_plain_attention():
    layer = pyfast.LocalSelfAttention(24, 3, head_dim=16, chunk_length=32)
    x = torch.randn(2, 45, 24)
    q, k, v = (
        linear(x).unflatten(-1, (3, 16)).transpose(1, 2)
        for linear in (layer.query, layer.key, layer.value)
    )
    assert (layer(x) - layer.out(plain(q, k, v, 32).transpose(1, 2).flatten(2))).abs().max() < 1e-6


# --- rotary positions ---


def test_scores_of_turned_rows_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).expand(2, 50, 8)
    cos, sin = (t.double() for t in rotary.tables(3, 50, 8, q.device))
    scores = rotary.rotate(q, (cos, sin)) @ rotary.rotate(k, (cos, sin)).T
    for distance in (0, 1, 7):
        assert scores.diagonal(-distance).std() < 1e-6 * scores.abs().max()
    assert scores.std() > 1e-3


def test_tables_go_on():
    whole = rotary.tables(0, 30, 16, torch.device("cpu"))
    assert all(
        torch.equal(a[20:], b)
        for a, b in zip(whole, rotary.tables(20, 10, 16, torch.device("cpu")))
    )


def test_transformers_turns_alike():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    x, embedding = (
        torch.randn(1, 2, 20, 16),
        LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=2)),
    )
    theirs, _ = apply_rotary_pos_emb(x, x, *embedding(x, torch.arange(20)[None]))
    assert (rotary.rotate(x, rotary.tables(0, 20, 16, x.device)) - theirs).abs().max() < 1e-5


Q = torch.zeros(1, 2, 20, 8)
LAYER = pyfast.LocalSelfAttention(24, 3, chunk_length=16)
ERRORS = {
    "q a list": (lambda: pyfast.local_attention([1], Q, Q), TypeError, "q must be a torch.Tensor"),
    "k shape": (
        lambda: pyfast.local_attention(Q, Q[:, :, 1:], Q),
        ValueError,
        r"k has shape \[1, 2, 19, 8\]",
    ),
    "k dtype": (
        lambda: pyfast.local_attention(Q, Q.half(), Q),
        TypeError,
        "k is torch.float16 but q is torch.float32",
    ),
    "v heads": (
        lambda: pyfast.local_attention(Q, Q, Q[:, [0] * 3]),
        ValueError,
        "v has 3 heads; it must have a divisor of q's 2",
    ),
    "chunk": (
        lambda: pyfast.local_attention(Q, Q, Q, chunk_length=20),
        ValueError,
        "chunk_length is 20",
    ),
    "mask": (
        lambda: pyfast.local_attention(Q, Q, Q, key_padding_mask=Q),
        TypeError,
        "key_padding_mask is",
    ),
    "dropout": (
        lambda: pyfast.local_attention(Q, Q, Q, dropout_p=1.5),
        ValueError,
        "dropout_p is 1.5",
    ),
    "seed": (
        lambda: pyfast.local_attention(Q, Q, Q, dropout_p=0.5, seed="a"),
        TypeError,
        "seed must be",
    ),
    "x": (
        lambda: LAYER(torch.zeros(2, 3)),
        ValueError,
        r"x has shape \[2, 3\]; it must be \[batch, length, 24\]",
    ),
    "cache": (
        lambda: LAYER(torch.zeros(1, 2, 24), cache={}),
        TypeError,
        "cache must be a LocalCache",
    ),
    "rotary": (
        lambda: LAYER(torch.zeros(1, 5, 24), rotary=rotary.tables(0, 4, 8, Q.device)),
        ValueError,
        r"rotary has shapes \[4, 4\] and \[4, 4\]",
    ),
    "width": (lambda: pyfast.LocalSelfAttention(25, 3), ValueError, "width is 25"),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_cache_of_another_batch_is_refused():
    cache = pyfast.LocalCache()
    LAYER(torch.zeros(2, 3, 24), cache=cache)
    with pytest.raises(ValueError, match="x has batch size 1; it must be the cache's, 2"):
        LAYER(torch.zeros(1, 3, 24), cache=cache)
    with pytest.raises(
        ValueError, match=r"indices is \[0, 2\]; it must be a list of examples of the cache, .* 2"
    ):
        cache.reorder(torch.tensor([0, 2]))
    assert cache.length == 3
