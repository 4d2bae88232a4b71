"""Decoding with an LSHCache: each step equals the forward over all tokens; the cache itself."""

import copy
import pickle

import pytest
import torch

import pyfast
from pyfast.nn import lsh_cache, lsh_decoding
from pyfast.reference import lsh_options

CHOICES = {
    "trax": {},
    "paper": {"preset": "paper"},
    "lucidrains": {"preset": "lucidrains"},
    "wrap in the round": {"wrap": "round", "correct_duplicates": True},
    "one round": {"n_hashes": 1},
    "one round, twice": {"n_hashes": 1, "wrap": "round", "attend_self": True, "key_norm": "none"},
    "grouped": {"value_heads": 2, "mask_queries": True},
    "keys": {"separate_keys": True, "same_bucket": True},
    "keys, grouped": {
        "separate_keys": True,
        "value_heads": 1,
        "correct_duplicates": True,
        "wrap": "none",
    },
    "keys, not the own": {"separate_keys": True, "attend_self": False, "pad_bucket": False},
}


def layer_of(dtype=torch.float64, **options):
    options = {"n_hashes": 3, "chunk_length": 16, "n_buckets": 6, "dtype": dtype} | options
    return pyfast.LSHSelfAttention(24, 4, **options)


def stepwise(layer, x, steps, mask=None, cache=None):
    """Run x in steps of these lengths. Return the result of each, and the cache."""
    cache, found, start = pyfast.LSHCache() if cache is None else cache, [], 0
    for count in steps:
        some = slice(start, start + count)
        found.append(
            layer(x[:, some], cache=cache, key_padding_mask=None if mask is None else mask[:, some])
        )
        start += count
    return found, cache


def forward_with_buckets_of(cache, layer, x, mask=None):
    length = x.shape[1]
    buckets = cache.so_far("buckets")[..., :length]
    return layer(x, buckets=buckets if layer.key is not None else buckets[0], key_padding_mask=mask)


def test_many_rows_are_gathered_a_few_at_a_time(monkeypatch):
    layer, x = layer_of(), torch.randn(2, 60, 24).double()
    cache = pyfast.LSHCache()
    layer(x[:, :20], cache=cache)
    other = copy.deepcopy(cache)
    y = layer(x[:, 20:], cache=cache)
    sizes, attend = [], lsh_decoding._attend
    monkeypatch.setattr(lsh_decoding, "_MAX_GATHERED", 2 * 4 * 2 * 16 * 3 * 12 * 7)
    monkeypatch.setattr(
        lsh_decoding, "_attend", lambda rows, *rest: sizes.append(len(rows)) or attend(rows, *rest)
    )
    torch.testing.assert_close(layer(x[:, 20:], cache=other), y)
    assert sizes == [7] * 5 + [5]


# --- decoding ---


@pytest.mark.parametrize(
    "steps", [(1,) * 20, (7, 1, 1, 30), (33, 3, 3, 3), (64, 1, 20), (16, 1, 15, 1)], ids=str
)
@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES.keys())
def test_a_step_is_the_forward_over_the_tokens_so_far(options, steps):
    layer, x = layer_of(**options), torch.randn(2, sum(steps), 24).double()
    mask = torch.rand(2, sum(steps)) < 0.8
    for given in (None, mask):
        found, cache = stepwise(layer, x, steps, given)
        end = 0
        for count, y in zip(steps, found):
            end += count
            whole = forward_with_buckets_of(
                cache, layer, x[:, :end], None if given is None else given[:, :end]
            )
            torch.testing.assert_close(y, whole[:, -count:], rtol=1e-10, atol=1e-12)
        assert cache.length == end


@pytest.mark.parametrize("options", [{}, {"separate_keys": True, "value_heads": 2}], ids=str)
def test_a_hash_seed_finds_the_forward_s_buckets(options):
    layer, x = layer_of(hash_seed=3, **options), torch.randn(2, 50, 24).double()
    found, cache = stepwise(layer, x, (30, 19, 1))
    whole, buckets = layer(x, return_buckets=True)
    assert torch.equal(cache.so_far("buckets"), buckets if options else buckets[None])
    torch.testing.assert_close(found[-1], whole[:, -1:])


def test_masks_may_come_and_go():
    layer, x = layer_of(), torch.randn(2, 40, 24).double()
    mask = torch.rand(2, 40) < 0.5
    mask[:, 20:39] = True
    cache = pyfast.LSHCache()
    layer(x[:, :20], cache=cache, key_padding_mask=mask[:, :20])
    layer(x[:, 20:39], cache=cache)
    last = layer(x[:, 39:], cache=cache, key_padding_mask=mask[:, 39:])
    torch.testing.assert_close(last, forward_with_buckets_of(cache, layer, x, mask)[:, -1:])


def test_buckets_are_returned_of_the_new_tokens():
    layer, x, cache = layer_of(), torch.randn(2, 40, 24).double(), pyfast.LSHCache()
    parts = [
        layer(x[:, some], cache=cache, return_buckets=True)[1]
        for some in (slice(30), slice(30, 40))
    ]
    assert torch.equal(torch.cat(parts, dim=-1), cache.so_far("buckets")[0])


def test_rounds_of_the_first_call_stay():
    layer, x = layer_of(), torch.randn(2, 40, 24).double()
    cache = pyfast.LSHCache()
    layer(x[:, :30], cache=cache, n_hashes=5)
    layer(x[:, 30:35], cache=cache)
    layer(x[:, 35:], cache=cache, n_hashes=5)
    assert cache.so_far("buckets").shape == (1, 2, 4, 5, 40)


@pytest.mark.parametrize("preset", ["trax", "lucidrains"])
@pytest.mark.parametrize("max_length", [None, 8192])
def test_number_of_buckets(preset, max_length):
    layer, cache = layer_of(n_buckets=None, preset=preset), pyfast.LSHCache(max_length)
    layer(torch.randn(1, 100, 24).double(), cache=cache)
    assert cache.factors == lsh_options.default_buckets(preset, max_length or 100, 16)
    layer, cache = layer_of(n_buckets=(2, 4), preset=preset), pyfast.LSHCache(max_length)
    layer(torch.randn(1, 100, 24).double(), cache=cache)
    assert cache.factors == (2, 4)


def test_no_new_tokens():
    layer, x, cache = layer_of(), torch.randn(2, 40, 24).double(), pyfast.LSHCache()
    assert layer(x[:, :0], cache=cache).shape == (2, 0, 24) and cache.length == 0
    layer(x, cache=cache)
    assert layer(x[:, :0], cache=cache).shape == (2, 0, 24) and cache.length == 40


def test_a_step_under_autocast():
    layer, x = layer_of(torch.float32, hash_seed=3), torch.randn(2, 40, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, cache = stepwise(layer, x, (39, 1))
        whole = forward_with_buckets_of(cache, layer, x)
    assert found[-1].dtype == cache.so_far("keys").dtype == torch.bfloat16
    torch.testing.assert_close(found[-1], whole[:, -1:], rtol=2e-2, atol=2e-2)


# --- the cache ---


def test_room_doubles_up_to_the_most():
    layer, x = layer_of(), torch.randn(2, 100, 24).double()
    _, free = stepwise(layer, x, (3,) + (1,) * 97)
    _, bounded = stepwise(layer, x, (3,) + (1,) * 97, cache=pyfast.LSHCache(100))
    room = {
        name: tensor.shape[lsh_cache._TOKEN_DIM[name]] for name, tensor in free._storage.items()
    }
    assert room == dict.fromkeys(("keys", "values", "buckets", "mask"), 3 * 2**6)
    assert {
        tensor.shape[lsh_cache._TOKEN_DIM[name]] for name, tensor in bounded._storage.items()
    } == {100}


@pytest.mark.parametrize("indices", [[1, 0, 2], [2, 2, 2, 0, 1], [1]], ids=str)
@pytest.mark.parametrize("options", [{}, {"separate_keys": True, "value_heads": 2}], ids=str)
def test_reorder(options, indices):
    layer, x = layer_of(**options), torch.randn(3, 40, 24).double()
    mask = torch.rand(3, 39) < 0.8
    _, cache = stepwise(layer, x, (30, 9), mask)
    indices = torch.tensor(indices)
    cache.reorder(indices)
    last = torch.randn(len(indices), 1, 24).double()
    y = layer(last, cache=cache)
    mask = torch.cat([mask[indices], torch.ones(len(indices), 1, dtype=torch.bool)], dim=1)
    whole = forward_with_buckets_of(cache, layer, torch.cat([x[indices, :39], last], dim=1), mask)
    torch.testing.assert_close(y, whole[:, -1:])


def test_no_gradient():
    layer, x, cache = (
        layer_of(),
        torch.randn(2, 40, 24, dtype=torch.float64, requires_grad=True),
        pyfast.LSHCache(),
    )
    assert (
        not layer(x, cache=cache).requires_grad and not layer(x[:, :1], cache=cache).requires_grad
    )


def test_inference_mode_may_come_and_go():
    layer, x, cache = layer_of(), torch.randn(2, 40, 24).double(), pyfast.LSHCache()
    with torch.inference_mode():
        layer(x[:, :30], cache=cache)
        cache.reorder(torch.tensor([1, 0]))
    cache.reorder(torch.tensor([1, 0]))
    layer(x[:, 30:35], cache=cache)
    with torch.inference_mode():
        y = layer(x[:, 35:], cache=cache)
    torch.testing.assert_close(y, forward_with_buckets_of(cache, layer, x)[:, 35:])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_its_own_way(copied):
    layer, x = layer_of(), torch.randn(2, 40, 24).double()
    _, cache = stepwise(layer, x, (30, 5))
    other = copied(cache)
    y = layer(x[:, 35:], cache=cache)
    layer(x[:, :3], cache=cache)
    assert (
        torch.equal(layer(x[:, 35:], cache=other), y) and other.length == 40 and cache.length == 43
    )


LAYER, X = layer_of(torch.float32), torch.randn(2, 5, 24)
BEGUN = pyfast.LSHCache(8)
LAYER(X, cache=BEGUN)


def step_after_moving_to(place):
    layer, cache = layer_of(torch.float32), pyfast.LSHCache()
    layer(X, cache=cache)
    layer.to(place)(X.to(place), cache=cache)


BAD = {
    "not a cache": (lambda: LAYER(X, cache={}), TypeError, "cache must be a LSHCache, not dict"),
    "max_length": (
        lambda: pyfast.LSHCache(2.5),
        ValueError,
        "max_length is 2.5; it must be an integer",
    ),
    "batch": (
        lambda: LAYER(X[:1, :1], cache=BEGUN),
        ValueError,
        "x has batch size 1; it must be the cache's, 2",
    ),
    "dtype": (
        lambda: step_after_moving_to(torch.float64),
        TypeError,
        "key is torch.float64 but cache is torch.float32",
    ),
    "device": (
        lambda: step_after_moving_to("meta"),
        ValueError,
        "x is on meta but cache is on cpu",
    ),
    "too long": (
        lambda: LAYER(X[:, :4], cache=BEGUN),
        ValueError,
        "x has 4 tokens and the cache 5; together they must be at most its max_length, 8",
    ),
    "prompt too long": (
        lambda: LAYER(X, cache=pyfast.LSHCache(4)),
        ValueError,
        "x has 5 tokens and the cache 0",
    ),
    "rounds": (
        lambda: LAYER(X[:, :1], cache=BEGUN, n_hashes=4),
        ValueError,
        "n_hashes is 4; it must be the 3 that cache was begun with",
    ),
    "another layer": (
        lambda: layer_of(torch.float32)(X[:, :1], cache=BEGUN),
        ValueError,
        "cache has another layer's tokens; it must be this layer's own",
    ),
    "not causal": (
        lambda: layer_of(torch.float32, causal=False)(X, cache=pyfast.LSHCache()),
        ValueError,
        "cache is given and causal is False",
    ),
    "dropout": (
        lambda: layer_of(torch.float32, dropout=0.1)(X, cache=pyfast.LSHCache()),
        ValueError,
        r"cache is given in training with dropout 0.1; call eval\(\)",
    ),
    "buckets": (
        lambda: LAYER(
            X, cache=pyfast.LSHCache(), buckets=torch.zeros(2, 4, 3, 5, dtype=torch.int32)
        ),
        ValueError,
        "buckets and cache are given; they must not be both",
    ),
    "mask": (
        lambda: LAYER(X[:, :1], cache=BEGUN, key_padding_mask=torch.ones(2, 6, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask has shape \[2, 6\]; it must be \[2, 1\]",
    ),
    "indices": (
        lambda: BEGUN.reorder([0, 1]),
        TypeError,
        "indices must be a torch.Tensor, not list",
    ),
    "indices of floats": (
        lambda: BEGUN.reorder(torch.ones(2)),
        TypeError,
        "indices is torch.float32",
    ),
    "indices too large": (
        lambda: BEGUN.reorder(torch.tensor([0, 2])),
        ValueError,
        r"indices is \[0, 2\]; it must be a list of examples of the cache, which holds 2",
    ),
    "indices of none": (
        lambda: pyfast.LSHCache().reorder(torch.tensor([0])),
        ValueError,
        "which holds 0",
    ),
    "indices, a matrix": (
        lambda: BEGUN.reorder(torch.tensor([[0]])),
        ValueError,
        r"indices is \[\[0\]\]",
    ),
}


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD.keys())
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert BEGUN.length == 5


def test_a_copy_of_layer_and_cache_goes_on():
    layer, cache = pyfast.LSHSelfAttention(16, 2, hash_seed=1).eval(), pyfast.LSHCache()
    x = torch.randn(1, 9, 16)
    layer(x[:, :5], cache=cache)
    other, copied = copy.deepcopy((layer, cache))
    assert torch.equal(layer(x[:, 5:], cache=cache), other(x[:, 5:], cache=copied))
