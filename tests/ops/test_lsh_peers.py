"""LSH attention against transformers' Reformer and reformer_pytorch: same buckets, same values, same gradients."""

import math
from dataclasses import replace

import pytest
import torch
from reformer_pytorch import LSHAttention
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerDynamicCache

import pyfast
from pyfast.reference import lsh_options

BATCH, HEADS, DIM, CHUNK = 2, 3, 8, 16
WIDTH = HEADS * DIM


def assert_equal_to(peer, ours, tolerance=1e-5):
    assert ours.shape == peer.shape and (ours - peer).abs().max() <= tolerance * peer.abs().max()


def some_tokens(length):
    """A mask with padding at the end of one example, and within the other."""
    mask = torch.rand(BATCH, length) < 0.7
    mask[0] = torch.arange(length) < length - length // 3
    return mask


# --- transformers ---


def hf_layers(rounds, n_buckets, causal, length=4096):
    """transformers' layer and ours, with its weights and without an output projection."""
    config = ReformerConfig(
        attn_layers=["lsh"],
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=DIM,
        lsh_attn_chunk_length=CHUNK,
        num_buckets=list(n_buckets) if isinstance(n_buckets, tuple) else n_buckets,
        num_hashes=rounds,
        is_decoder=causal,
        hash_seed=3,
        max_position_embeddings=length,
        lsh_attention_probs_dropout_prob=0.0,
    )
    theirs = LSHSelfAttention(config, layer_idx=0)
    ours = pyfast.LSHSelfAttention(
        WIDTH,
        HEADS,
        n_hashes=rounds,
        chunk_length=CHUNK,
        n_buckets=n_buckets,
        causal=causal,
        preset="hf",
    )
    ours.load_state_dict(theirs.state_dict() | {"out.weight": torch.eye(WIDTH)})
    return theirs, ours


def by_head(x):
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def without_offsets(buckets, n_buckets):
    return buckets - n_buckets * torch.arange(buckets.shape[2])[:, None]


def hashed(ours, x, mask, rotations):
    """The buckets that attention itself finds, and where a head of a token sees no key but its own."""
    options = {
        "chunk_length": CHUNK,
        "n_buckets": ours.n_buckets,
        "causal": ours.causal,
        "preset": "hf",
    }
    options |= {
        "rotations": rotations,
        "key_padding_mask": mask,
        "return_lse": True,
        "return_buckets": True,
    }
    _, lse, buckets = pyfast.lsh_attention(
        by_head(ours.query_key(x)), by_head(ours.value(x)), **options
    )
    return buckets, (lse == -math.inf).transpose(1, 2).repeat_interleave(DIM, dim=-1)


def gradients(layer, y, x, dy):
    return torch.autograd.grad(y, [x, layer.query_key.weight, layer.value.weight], dy)


@pytest.mark.parametrize("rounds, length", [(1, 96), (2, 32), (2, 64), (4, 48)])
@pytest.mark.parametrize("n_buckets", [6, (2, 4)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_transformers(causal, masked, rounds, n_buckets, length):
    theirs, ours = hf_layers(rounds, n_buckets, causal)
    x = 3 * torch.randn(BATCH, length, WIDTH)
    x.requires_grad_()
    mask = some_tokens(length) if masked else None
    found = theirs(x, attention_mask=mask)
    n_ids = math.prod((n_buckets,) if isinstance(n_buckets, int) else n_buckets)
    buckets = without_offsets(found.buckets, n_ids + masked)

    torch.manual_seed(3)  # its hash_seed
    width = (n_buckets if isinstance(n_buckets, int) else sum(n_buckets)) // 2
    ours_buckets, lonely = hashed(ours, x, mask, torch.randn(HEADS, DIM, rounds, width))
    assert torch.equal(ours_buckets, buckets)

    y = ours(x, buckets=buckets, key_padding_mask=mask)
    # A query that sees but itself does so with a score of -1e5 there, and the log-sum-exp of
    # several rounds' is right to 2^-7: up to 1.5 % of its value. Here it has its own value, and all
    # others are compared to the last digits.
    assert torch.equal(y[lonely], ours.value(x)[lonely])
    if lonely.any():
        assert_equal_to(found.hidden_states[lonely], y[lonely], 1e-5 if rounds == 1 else 2e-2)
    compared = ~lonely if rounds > 1 else torch.ones_like(lonely)
    assert compared.float().mean() > 0.5
    assert_equal_to(found.hidden_states * compared, y * compared)
    dy = torch.randn_like(y) * compared
    for a, b in zip(
        gradients(theirs, found.hidden_states, x, dy), gradients(ours, y, x, dy), strict=True
    ):
        assert_equal_to(a, b)


def test_transformers_norm_of_small_keys():
    """Where what is added to the mean square counts."""
    theirs, ours = hf_layers(1, 4, False)
    x = 1e-3 * torch.randn(BATCH, 64, WIDTH)
    x.requires_grad_()
    found = theirs(x)
    y = ours(x, buckets=without_offsets(found.buckets, 4))
    dy = torch.randn_like(y)
    for a, b in zip(
        gradients(theirs, found.hidden_states, x, dy), gradients(ours, y, x, dy), strict=True
    ):
        assert_equal_to(a, b)


@pytest.mark.parametrize("length", [1, 11, 16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_transformers_short(causal, masked, length):
    """No longer than a chunk it attends to all tokens; so does one chunk, in however many rounds."""
    theirs, ours = hf_layers(3, 4, causal)
    x = 3 * torch.randn(BATCH, length, WIDTH)
    x.requires_grad_()
    mask = some_tokens(length) if masked else None
    theirs_y, y = theirs(x, attention_mask=mask).hidden_states, ours(x, key_padding_mask=mask)
    assert_equal_to(theirs_y, y)
    dy = torch.randn_like(y)
    for a, b in zip(gradients(theirs, theirs_y, x, dy), gradients(ours, y, x, dy), strict=True):
        assert_equal_to(a, b)


@pytest.mark.parametrize("length", [16, 48, 64, 4096, 16 * 3000, 2**19])
def test_transformers_bucket_rule(length):
    theirs, _ = hf_layers(1, None, True, length)
    theirs._set_num_buckets(length)
    chosen = (
        (theirs.num_buckets,) if isinstance(theirs.num_buckets, int) else tuple(theirs.num_buckets)
    )
    assert lsh_options.default_buckets("hf", length, CHUNK) == chosen


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("prompt", [63, 95])
def test_transformers_decoding(prompt, rounds):
    """One token after a prompt. Its window wraps in its own round, and is ours where the last chunk is a full one."""
    theirs, ours = hf_layers(rounds, 6, True)
    ours = pyfast.LSHSelfAttention(
        WIDTH, HEADS, n_hashes=rounds, chunk_length=CHUNK, n_buckets=6, preset="hf", wrap="round"
    )
    ours.load_state_dict(theirs.state_dict() | {"out.weight": torch.eye(WIDTH)})
    x = 3 * torch.randn(1, prompt + 1, WIDTH)
    torch.manual_seed(3)
    rotations = torch.randn(HEADS, DIM, rounds, 3)
    buckets = pyfast.lsh_buckets(by_head(ours.query_key(x)), n_buckets=6, rotations=rotations)
    past = ReformerDynamicCache()
    past.update((buckets + 6 * torch.arange(rounds)[:, None])[..., :-1].long(), x[:, :-1], 0)
    step = theirs(x[:, -1:], past_buckets_states=past, use_cache=True).hidden_states
    assert_equal_to(step, ours(x, buckets=buckets)[:, -1:])


# --- reformer_pytorch ---


def lucidrains_rotations(seed, per_head, rounds, n_buckets):
    torch.manual_seed(seed)
    found = torch.randn(BATCH * HEADS if per_head else 1, DIM, rounds, n_buckets // 2)
    return found.view(BATCH, HEADS, DIM, rounds, -1) if per_head else found[0]


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("same_bucket", [False, True])
@pytest.mark.parametrize("correct_duplicates", [False, True])
def test_reformer_pytorch(correct_duplicates, same_bucket, causal, masked, rounds):
    length = 96
    n_buckets = length // CHUNK
    options = {
        "attend_across_buckets": not same_bucket,
        "allow_duplicate_attention": not correct_duplicates,
    }
    theirs = LSHAttention(
        bucket_size=CHUNK,
        n_hashes=rounds,
        causal=causal,
        random_rotations_per_head=causal,
        **options,
    )
    qk, v = (torch.randn(BATCH, HEADS, length, DIM, requires_grad=True) for _ in range(2))
    mask = some_tokens(length) if masked else None
    torch.manual_seed(5)
    flat_mask = mask.repeat_interleave(HEADS, dim=0) if masked else None
    their_out, _, their_buckets = theirs(qk.flatten(0, 1), v.flatten(0, 1), input_mask=flat_mask)
    their_out = their_out.view(v.shape)
    out, lse, buckets = pyfast.lsh_attention(
        qk,
        v,
        preset="lucidrains",
        causal=causal,
        chunk_length=CHUNK,
        rotations=lucidrains_rotations(5, causal, rounds, n_buckets),
        same_bucket=same_bucket,
        correct_duplicates=correct_duplicates,
        key_padding_mask=mask,
        return_lse=True,
        return_buckets=True,
    )
    assert torch.equal(without_offsets(their_buckets.view(buckets.shape), n_buckets), buckets)

    # Alone, a query's score of itself is -5e4 there, and the sum over rounds right to 2^-8.
    lonely = lse == -math.inf
    assert torch.equal(out[lonely], v[lonely])
    if masked:  # a masked query sees nothing
        assert lonely[~mask[:, None].expand_as(lonely)].all()
    compared = ~lonely if rounds > 1 else torch.ones_like(lonely)
    if correct_duplicates and not same_bucket and rounds > 1:
        # It counts no pair that meets where a round's first chunk looks back on the round before,
        # and so divides by nearly 0: the scores grow by 20.
        rank = torch.ops.pyfast.lsh_sort(buckets, n_buckets)[1]
        compared = compared & (rank >= CHUNK).all(dim=2)
    elif lonely.any():
        assert_equal_to(their_out[lonely], out[lonely], 1e-5 if rounds == 1 else 6e-3)
    assert compared.float().mean() > 0.3
    dout = torch.randn_like(out) * compared[..., None]
    assert_equal_to(their_out[compared], out[compared])
    grads = [torch.autograd.grad(y, [qk, v], dout) for y in (their_out, out)]
    for a, b in zip(*grads, strict=True):
        assert_equal_to(a, b)


@pytest.mark.parametrize("length", [32, 64, 96, 4096])
def test_reformer_pytorch_bucket_rule(length):
    assert lsh_options.default_buckets("lucidrains", length, CHUNK) == (length // CHUNK,)


# --- trax ---


def test_trax_is_transformers_but_for_the_number_of_buckets():
    """transformers' Reformer is a port of trax's, and its authors compared the two."""
    assert replace(pyfast.LSH_PRESETS["trax"], bucket_rule="hf") == pyfast.LSH_PRESETS["hf"]


@pytest.mark.parametrize(
    "length, expected",
    [
        (1, (2,)),
        (64, (2,)),
        (1000, (30,)),
        (4096, (128,)),
        (4160, (16, 8)),
        (65536, (64, 32)),
        (524288, (128, 128)),
    ],
)
def test_trax_bucket_rule(length, expected):
    """2 length / 64; above 128 in two even factors, the first the power of 2 from the square root upwards."""
    assert lsh_options.default_buckets("trax", length, 64) == expected
