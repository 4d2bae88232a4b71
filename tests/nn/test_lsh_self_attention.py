"""LSHSelfAttention: values and gradients against float64, seeds, replays, compile, errors."""

import copy
import pickle

import pytest
import torch
from helpers.tolerance import DTYPES, assert_as_exact_as_torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast import reference

OPTIONS = {
    "plain": {},
    "biases": {"bias": True, "out_bias": True, "causal": False},
    "paper": {"preset": "paper", "head_dim": 12},
    "lucidrains": {"preset": "lucidrains", "value_heads": 1},
    "keys": {"separate_keys": True, "value_heads": 2, "bias": True},
    "choices": {"scale": 0.3, "wrap": "round", "correct_duplicates": True, "attend_self": True},
}


def layer_of(**options):
    return pyfast.LSHSelfAttention(
        24, 4, **{"n_hashes": 2, "chunk_length": 16, "n_buckets": 6} | options
    )


def composed(layer, x, mask, buckets):
    """Compute the layer in plain torch from its definition."""

    def projected(linear, heads):
        return (
            F.linear(x, linear.weight, linear.bias)
            .unflatten(-1, (heads, layer.head_dim))
            .transpose(1, 2)
        )

    q, v = projected(layer.query_key, layer.heads), projected(layer.value, layer.value_heads)
    k = None if layer.key is None else projected(layer.key, layer.value_heads)
    options = {
        "chunk_length": 16,
        "n_buckets": 6,
        "causal": layer.causal,
        "preset": layer.preset,
        **layer.choices,
    }
    out = reference.lsh_attention(q, v, k=k, key_padding_mask=mask, buckets=buckets, **options)
    return F.linear(out.transpose(1, 2).flatten(2), layer.out.weight, layer.out.bias)


def with_gradients(y, x, layer, dy):
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [17, 50])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(device, options, length, dtype):
    layer = layer_of(**options, dtype=dtype, device=device)
    x = torch.randn(2, length, 24, device=device).to(dtype).requires_grad_()
    mask, dy = torch.rand(2, length, device=device) < 0.8, torch.randn(2, length, 24, device=device)
    y, buckets = layer(x, key_padding_mask=mask, return_buckets=True)
    double, x_double = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    torchs = with_gradients(composed(layer, x, mask, buckets), x, layer, dy)
    exact = with_gradients(composed(double, x_double, mask, buckets), x_double, double, dy)
    for a, b, c in zip(with_gradients(y, x, layer, dy), torchs, exact, strict=True):
        assert_as_exact_as_torch(a, b, c)


@pytest.mark.parametrize("options", [{}, {"separate_keys": True}, {"hash_seed": 3}], ids=str)
@pytest.mark.parametrize("shape", [(2, 0), (0, 20)], ids=str)
def test_no_tokens(device, shape, options):
    layer = layer_of(**options, n_buckets=None, device=device)
    y = layer(torch.randn(*shape, 24, device=device))
    y.sum().backward()
    assert y.shape == (*shape, 24) and not any(p.grad.any() for p in layer.parameters())


# --- hashing and chance ---


def test_number_of_rounds():
    layer, x = layer_of(n_hashes=3), torch.randn(1, 40, 24)
    assert layer(x, return_buckets=True)[1].shape == (1, 4, 3, 40)
    y, buckets = layer(x, n_hashes=5, return_buckets=True)
    assert buckets.shape == (1, 4, 5, 40)
    assert torch.equal(layer(x, buckets=buckets), y)


@pytest.mark.parametrize("preset", ["trax", "lucidrains"])
def test_number_of_buckets_is_the_preset_s(preset):
    layer = layer_of(n_buckets=None, preset=preset, hash_seed=1)
    buckets = layer(torch.randn(1, 160, 24), return_buckets=True)[1]
    assert int(buckets.max()) == {"trax": 19, "lucidrains": 9}[preset]


def test_new_rotations_every_call_but_from_torch_s_generator():
    layer, x = layer_of(), torch.randn(2, 40, 24)
    found = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(layer(x, return_buckets=True)[1])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("options", [{}, {"separate_keys": True}], ids=str)
def test_a_hash_seed_is_the_same_always(options):
    layer, x = layer_of(hash_seed=3, **options), torch.randn(2, 40, 24)
    y, buckets = layer(x, return_buckets=True)
    assert torch.equal(layer(x), y)
    layer.hash_seed = 4
    assert not torch.equal(layer(x, return_buckets=True)[1], buckets)
    expected = pyfast.lsh_buckets(
        layer.query_key(x).unflatten(-1, (4, 6)).transpose(1, 2), n_hashes=2, n_buckets=6, seed=3
    )
    assert torch.equal(buckets[0] if options else buckets, expected)


@pytest.mark.parametrize("hash_seed", [None, 3])
def test_dropout_is_new_every_call_and_in_training_only(hash_seed):
    layer, x = layer_of(dropout=0.5, hash_seed=hash_seed), torch.randn(2, 40, 24)
    _, buckets = layer(x, return_buckets=True)
    first, second = (layer(x, buckets=buckets) for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    plain = layer_of()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, buckets=buckets), plain(x, buckets=buckets))


@pytest.mark.parametrize(
    "options", [{}, {"separate_keys": True, "value_heads": 2}, {"hash_seed": 3}], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_replay_with_the_buckets_is_the_same_to_the_bit(options, dropout):
    """The backward of a reversible layer relies on it. The generator ends in the same state, too."""
    layer, x = layer_of(dropout=dropout, **options), torch.randn(2, 40, 24)
    state = torch.get_rng_state()
    y, buckets = layer(x, return_buckets=True)
    after = torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(layer(x, buckets=buckets), y) and torch.equal(torch.rand(3), after)


# --- as a module ---


@pytest.mark.parametrize(
    "options", [{}, {"hash_seed": 3, "separate_keys": True, "dropout": 0.1}], ids=str
)
def test_compiles_whole(device, options):
    layer = layer_of(device=device, **options).train(not options)
    compiled = torch.compile(layer, fullgraph=True)
    for mask in (None, torch.rand(2, 40, device=device) < 0.8):
        x = torch.randn(2, 40, 24, device=device, requires_grad=True)
        _, buckets = layer(x, key_padding_mask=mask, return_buckets=True)
        ours = [f(x, key_padding_mask=mask, buckets=buckets) for f in (layer, compiled)]
        torch.testing.assert_close(*ours)
        torch.testing.assert_close(*(with_gradients(y, x, layer, torch.ones_like(y)) for y in ours))
        if layer.hash_seed is not None:
            torch.testing.assert_close(
                compiled(x, key_padding_mask=mask), layer(x, key_padding_mask=mask)
            )


def test_compiled_calls_draw_their_own_rotations():
    layer, x = layer_of(), torch.randn(2, 40, 24)
    compiled = torch.compile(layer, fullgraph=True)
    first, second = (compiled(x, return_buckets=True)[1] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    layer = layer_of(hash_seed=3, device=device)
    x = torch.randn(2, 40, 24, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
    assert torch.equal(y, copy.deepcopy(layer).to(dtype)(x.to(dtype)))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *layer.parameters()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_activation_checkpointing(device, given, reentrant):
    layer = layer_of(dropout=0.2, device=device)
    x = torch.randn(2, 40, 24, device=device, requires_grad=True)
    buckets = layer(x, return_buckets=True)[1] if given else None

    def block(x):
        return layer(x, buckets=buckets).relu()

    grads = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        grads.append(
            torch.autograd.grad(call(call(x)).square().sum(), x)[0]
            if not reentrant
            else through(call, x)
        )
    assert torch.equal(*grads)


def through(call, x):
    x.grad = None
    call(call(x)).square().sum().backward()
    return x.grad


def test_state_dict():
    layer, other = (
        layer_of(hash_seed=3, separate_keys=True, out_bias=True),
        layer_of(hash_seed=3, separate_keys=True, out_bias=True),
    )
    names = {f"{name}.weight" for name in ("query_key", "key", "value", "out")}
    assert set(layer.state_dict()) == names | {"out.bias"}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 40, 24)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    layer, x = layer_of(hash_seed=3, preset="paper", scale=0.5), torch.randn(2, 40, 24)
    assert torch.equal(copied(layer)(x), layer(x)) and repr(copied(layer)) == repr(layer)


def test_lora():
    layer = layer_of(hash_seed=3, separate_keys=True)
    model, x = nn.Sequential(layer), torch.randn(2, 40, 24)
    before = model(x)
    pyfast.add_lora(model, pyfast.LoRAConfig(r=2))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # lora_a has no gradients yet, because lora_b is 0.
    assert len(trained) == 4 and all("lora" in name for name in trained)
    cache = pyfast.LSHCache()
    parts = [layer(some, cache=cache) for some in x.split(20, dim=1)]
    torch.testing.assert_close(parts[1], layer(x, buckets=cache.so_far("buckets"))[:, 20:])


def test_trains():
    layer, x = layer_of(), torch.randn(4, 40, 24)
    target, optimizer, losses = (
        torch.randn(4, 40, 24),
        torch.optim.Adam(layer.parameters(), lr=1e-2),
        [],
    )
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_sizes_and_repr():
    layer = layer_of(head_dim=5, value_heads=2, separate_keys=True, bias=True, wrap="none")
    shapes = [
        tuple(linear.weight.shape)
        for linear in (layer.query_key, layer.key, layer.value, layer.out)
    ]
    assert shapes == [(20, 24), (10, 24), (10, 24), (24, 20)]
    assert [
        linear.bias is not None for linear in (layer.query_key, layer.key, layer.value, layer.out)
    ] == [True] * 3 + [False]
    assert layer.extra_repr() == (
        "24, 4, head_dim=5, n_hashes=2, chunk_length=16, n_buckets=6, causal=True, preset='trax', value_heads=2, "
        "dropout=0.0, hash_seed=None, wrap='none'"
    )


X = torch.randn(2, 20, 24)

BAD = {
    "width": (
        lambda: pyfast.LSHSelfAttention(24.0, 4),
        ValueError,
        "width is 24.0; it must be an integer",
    ),
    "no width": (
        lambda: pyfast.LSHSelfAttention(0, 4),
        ValueError,
        "width is 0; it must be at least 1",
    ),
    "heads": (
        lambda: pyfast.LSHSelfAttention(24, True),
        ValueError,
        "heads is True; it must be an integer",
    ),
    "width and heads": (
        lambda: pyfast.LSHSelfAttention(24, 5),
        ValueError,
        "width is 24; without head_dim it must be a multiple of heads, 5",
    ),
    "head_dim": (
        lambda: layer_of(head_dim=257),
        ValueError,
        "head_dim is 257; it must be at most 256",
    ),
    "head_dim, by width": (
        lambda: pyfast.LSHSelfAttention(1024, 2),
        ValueError,
        "head_dim is 512; it must be at most 256",
    ),
    "value_heads": (
        lambda: layer_of(value_heads=3),
        ValueError,
        "value_heads is 3; it must divide heads, 4",
    ),
    "n_hashes": (
        lambda: layer_of(n_hashes=0),
        ValueError,
        "n_hashes is 0; it must be an integer, 1 or more",
    ),
    "n_hashes none": (
        lambda: layer_of(n_hashes=None),
        ValueError,
        "n_hashes is None; it must be an integer",
    ),
    "chunk_length": (
        lambda: layer_of(chunk_length=24),
        ValueError,
        "chunk_length is 24; it must be a multiple of 16",
    ),
    "chunk_length a float": (
        lambda: layer_of(chunk_length=64.0),
        ValueError,
        "chunk_length is 64.0",
    ),
    "n_buckets": (lambda: layer_of(n_buckets=7), ValueError, "n_buckets is 7; it must be even"),
    "causal": (lambda: layer_of(causal="no"), TypeError, "causal must be a bool, not str"),
    "separate_keys": (
        lambda: layer_of(separate_keys=1),
        TypeError,
        "separate_keys must be a bool, not int",
    ),
    "bias": (lambda: layer_of(bias=None), TypeError, "bias must be a bool, not NoneType"),
    "preset": (lambda: layer_of(preset="jax"), ValueError, "preset is 'jax'; it must be 'trax'"),
    "a choice": (
        lambda: layer_of(wraps="none"),
        ValueError,
        "a choice is 'wraps'; it must be 'scale', 'key_norm', .* or 'attend_self'",
    ),
    "a choice's value": (
        lambda: layer_of(wrap="all"),
        ValueError,
        "wrap is 'all'; it must be 'rounds'",
    ),
    "dropout": (
        lambda: layer_of(dropout=1.0),
        ValueError,
        "dropout is 1.0; it must be a number from 0 up to, but not including, 1",
    ),
    "dropout a string": (
        lambda: layer_of(dropout="0.1"),
        ValueError,
        "dropout is .*; it must be a number from 0",
    ),
    "hash_seed": (
        lambda: layer_of(hash_seed=0.5),
        ValueError,
        "hash_seed is 0.5; it must be None or an integer",
    ),
    "dtype": (
        lambda: layer_of(dtype=torch.int8),
        ValueError,
        "dtype is torch.int8; it must be torch.float32",
    ),
    "x": (lambda: layer_of()(X.tolist()), TypeError, "x must be a torch.Tensor, not list"),
    "x of ints": (
        lambda: layer_of()(X.int()),
        TypeError,
        "x is torch.int32; it must be torch.float32",
    ),
    "x too wide": (
        lambda: layer_of()(torch.randn(2, 20, 25)),
        ValueError,
        r"x has shape \[2, 20, 25\]; it must be \[batch, length, 24\]",
    ),
    "x without batch": (
        lambda: layer_of()(X[0]),
        ValueError,
        r"x has shape \[20, 24\]; it must be \[batch",
    ),
    "rounds of a call": (
        lambda: layer_of()(X, n_hashes=0),
        ValueError,
        "n_hashes is 0; it must be an integer, 1",
    ),
    "buckets": (
        lambda: layer_of()(X, buckets=torch.zeros(2, 4, 20, dtype=torch.int32)),
        ValueError,
        r"buckets has shape \[2, 4, 20\]; it must be \[2, 4, 4, 20\]",
    ),
    "buckets beyond int32": (
        lambda: layer_of()(X, buckets=torch.full((2, 4, 2, 20), 2**32 + 1)),
        ValueError,
        "buckets holds ids from 2147483647 to 2147483647; they must be 0 to 6",
    ),
    "buckets' rounds": (
        lambda: layer_of()(X, n_hashes=3, buckets=torch.zeros(2, 4, 2, 20, dtype=torch.int32)),
        ValueError,
        r"buckets has shape \[2, 4, 2, 20\]; it must be \[2, 4, 3, 20\]",
    ),
    "mask": (
        lambda: layer_of()(X, key_padding_mask=torch.ones(2, 20)),
        TypeError,
        "key_padding_mask is torch.float32; it must be torch.bool",
    ),
    "mask's shape": (
        lambda: layer_of()(X, key_padding_mask=torch.ones(2, 21, dtype=torch.bool)),
        ValueError,
        r"key_padding_mask has shape \[2, 21\]; it must be \[2, 20\]",
    ),
}


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD.keys())
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
