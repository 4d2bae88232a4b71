"""The Reformer: values against a model composed of plain modules, training, errors."""

import math

import pytest
import torch
from helpers.reversible_nets import assert_close
from helpers.tiny_reformer import VOCAB, config, ids, loss_by_hand, model
from torch.nn import functional as F

import pyfast
from pyfast import Reformer, ReformerCache
from pyfast._support.measure import peak_bytes

VARIANTS = {
    "axial": {},
    "learned": {"positions": "learned"},
    "rotary": {"positions": "rotary"},
    "none": {"positions": "none"},
    "untied": {"tied": False},
    "head bias": {"tied": False, "head_bias": True},
    "chunks": {"feed_forward_chunk": 7},
    "one chunk": {"feed_forward_chunk": None},
    "lsh alone": {"layers": ("lsh",) * 3},
    "local alone": {"layers": ("local",)},
    "lucidrains": {"preset": "lucidrains"},
}


# --- the function ---


def composed(model, ids, mask=None):
    """Compute logits layer by layer; only the attentions are those of the model's forward."""
    c, n = model.config, ids.shape[1]
    x = model.tokens.weight[ids]
    if c.positions == "axial":
        at = torch.arange(n, device=ids.device)
        columns = c.axial_shape[1]
        x = x + torch.cat(
            [model.positions.rows[at // columns], model.positions.columns[at % columns]], -1
        )
    elif c.positions == "learned":
        x = x + model.positions.weight[:n]
    options = {"key_padding_mask": mask}
    if c.positions == "rotary":
        options["rotary"] = pyfast.nn.rotary.tables(0, n, c.head_dim, ids.device)
    x1 = x2 = x
    for f, g in model.layers.blocks():
        ff = g.ff
        x1 = x1 + f.attention(F.layer_norm(x2, [c.width], f.norm.weight, f.norm.bias), **options)
        hidden = (
            F.layer_norm(x1, [c.width], ff.norm.weight, ff.norm.bias) @ ff.up.weight.T + ff.up.bias
        )
        x2 = x2 + F.gelu(hidden) @ ff.down.weight.T + ff.down.bias
    x = (x1 + x2) / 2 if c.tied else torch.cat([x1, x2], -1)
    head = model.tokens if c.tied else model.head
    logits = F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias) @ head.weight.T
    return logits + head.bias if c.head_bias else logits


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients_are_those_of_the_layers_one_by_one(options, device):
    m, x = model(**options).to(device), ids(45, device=device)
    assert (m(x) - composed(m, x)).abs().max() < 1e-4
    labels = x.masked_fill(torch.rand(x.shape, device=device) < 0.3, -100)
    found, wanted = m(x, labels=labels), loss_by_hand(composed(m, x), labels)
    assert abs(found - wanted) < 1e-5
    parameters = list(m.parameters())
    assert_close(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), 1e-4
    )


def test_nothing_sees_what_is_masked(device):
    m, x = model().to(device), ids(60, device=device)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 40:] = mask[1, 20:30] = False
    found = m(x, key_padding_mask=mask)
    changed = m(x.where(mask, 7), key_padding_mask=mask)
    assert torch.equal(found[mask], changed[mask])
    assert (found - composed(m, x, mask))[mask].abs().max() < 1e-4


@pytest.mark.parametrize("positions", ["axial", "rotary"])
def test_no_token_sees_a_later_one(positions):
    m, x = model(positions=positions, tied=False), ids(60) // 2
    x[:, 33:] += VOCAB // 2
    m(x)[:, :33].square().sum().backward()
    of_tokens = m.tokens.weight.grad.abs().sum(-1)
    assert of_tokens[x[:, :33].unique()].all() and not of_tokens[VOCAB // 2 :].any()


@pytest.mark.parametrize("positions", ["axial", "learned"])
def test_what_is_filled_up_needs_no_positions(positions, device):
    sizes = {
        "lsh_chunk": 48,
        "local_chunk": 32,
        "n_buckets": 4,
        "pad_to": 96,
        "positions": positions,
    }
    m = model(max_length=250, axial_shape=(16, 16), **sizes).to(device)
    longer, x = (
        model(max_length=288, axial_shape=(18, 16), **sizes).to(device),
        ids(250, device=device),
    )
    longer.load_state_dict(
        m.state_dict() | {k: v for k, v in longer.state_dict().items() if "positions" in k}
    )
    with torch.no_grad():
        for name, parameter in m.positions.named_parameters():
            parameter.copy_(longer.positions.get_parameter(name)[: len(parameter)])
    assert torch.equal(m(x), longer(x))


def test_shapes_without_data():
    m, x = model(exact=True).to("meta"), ids(45).to("meta")
    assert m(x).shape == (2, 45, VOCAB) and m(x, labels=x).shape == ()


def test_a_long_loss_is_computed_in_pieces(monkeypatch):
    m, x = model(), ids(60)

    def run():
        loss = m(x, labels=x)
        return [loss, *torch.autograd.grad(loss, list(m.parameters()))]

    whole = run()
    monkeypatch.setattr(pyfast.models.reformer.loss, "TOKENS_AT_ONCE", 26)
    assert_close(run(), whole, 1e-5)
    with torch.no_grad():
        assert abs(m(x, labels=x) - whole[0]) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_hooks_of_a_long_loss_see_the_whole_gradient_once(tied, monkeypatch):
    m, x = model(tied=tied), ids(60)
    wanted = torch.autograd.grad(
        m(x, labels=x), parameters := [m.norm.weight, m.get_output_embeddings().weight]
    )
    monkeypatch.setattr(pyfast.models.reformer.loss, "TOKENS_AT_ONCE", 26)
    seen = []
    for parameter in parameters:
        parameter.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    m(x, labels=x).backward()
    assert len(seen) == 2
    assert_close([p.grad for p in parameters], [2 * grad for grad in wanted], 1e-5)


def test_no_labels_and_no_tokens():
    m, x = model(), ids(20)
    assert m(x, labels=torch.full_like(x, -100)) == 0
    assert m(x[:0]).shape == (0, 20, VOCAB) and m(x[:, :0]).shape == (2, 0, VOCAB)
    assert m(x[:, :1], labels=x[:, :1]) == 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_stored_activations_to_the_bit(dropout, autocast, device):
    options = {
        "dropout": dropout,
        "lsh_dropout": dropout,
        "local_dropout": dropout,
        "exact": True,
        "hash_seed": None,
    }
    x, found = ids(45, device=device), []
    for store in (False, True):
        m = model(store=store, feed_forward_chunk=16, **options).to(device)
        torch.manual_seed(5)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = m(x, labels=x)
        found.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("positions", ["axial", "rotary"])
def test_replays_drop_what_the_forward_dropped(positions, seed, device):
    """A replay of inexact streams gets buckets, but must draw random numbers as if it hashed."""
    rates = {"dropout": 0.2, "lsh_dropout": 0.2, "local_dropout": 0.2}
    x, found = ids(45, device=device), []
    for store in (False, True):
        m = model(store=store, positions=positions, hash_seed=seed, exact=False, **rates).to(device)
        torch.manual_seed(5)
        found.append(torch.autograd.grad(m(x, labels=x), list(m.parameters())))
    assert_close(*found, 1e-4)


def test_lora_and_gradient_free_embeddings():
    m = pyfast.add_lora(model(), pyfast.LoRAConfig(r=4))
    x = ids(40)
    m(x, labels=x).backward()
    trained = {name for name, parameter in m.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in m.named_parameters() if "lora" in name}
    assert all(m.get_parameter(name).grad.any() for name in trained if "lora_b" in name.lower())


def test_it_learns():
    m, x = model(), torch.arange(40).repeat(2, 1) % 7
    optimizer = torch.optim.Adam(m.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(m(x, labels=x))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_memory_does_not_grow_with_depth():
    def peak(depth):
        layers = ("local", "lsh") * (depth // 2)
        m = Reformer(
            config(layers=layers, width=32, heads=4, n_hashes=8, max_length=4096, exact=True)
        )
        x = ids(4096, 1)
        m(x, labels=x).backward()  # allocates the gradients
        return peak_bytes(lambda: m(x, labels=x).backward())

    assert peak(12) < 1.05 * peak(4)


def test_an_adapted_head_learns():
    m, x = pyfast.add_lora(model(tied=False), pyfast.LoRAConfig(r=4, targets=["head"])), ids(40)
    for name, parameter in m.named_parameters():
        if "lora_b" in name.lower():
            parameter.data.normal_()
    loss = m(x, labels=x)
    assert abs(loss - loss_by_hand(m(x), x)) < 1e-5
    loss.backward()
    assert all(p.grad is not None for p in m.parameters() if p.requires_grad)


def test_a_head_is_left_alone_unless_it_is_asked_for():
    m = pyfast.quantize(model(tied=False, width=64, heads=4))
    assert type(m.head) is torch.nn.Linear and type(m.layers.f0.attention.out) is pyfast.NF4Linear
    x = ids(20)
    assert abs(m(x, labels=x) - loss_by_hand(m(x), x)) < 1e-5


# --- bad input ---

M = model(dropout=0.1)
X = torch.zeros(1, 5, dtype=torch.int64)
CALLS = {
    "ids dtype": (lambda: M(X.int()), TypeError, "ids is torch.int32; it must be torch.int64"),
    "ids shape": (
        lambda: M(X[0]),
        ValueError,
        r"ids has shape \[5\]; it must be \[batch, length\]",
    ),
    "ids range": (
        lambda: M(X + VOCAB),
        ValueError,
        "ids holds numbers from 50 to 50; they must be 0 to 49",
    ),
    "too long": (
        lambda: M(X.repeat(1, 60)),
        ValueError,
        "ids has 300 tokens, with those before; .* 256",
    ),
    "labels shape": (lambda: M(X, labels=X[:, 1:]), ValueError, r"labels has shape \[1, 4\]"),
    "labels range": (lambda: M(X, labels=X + 60), ValueError, "labels holds"),
    "mask": (lambda: M(X, key_padding_mask=X), TypeError, "key_padding_mask is torch.int64"),
    "cache in training": (
        lambda: M(X, cache=ReformerCache(M)),
        ValueError,
        "cache is given with labels, or in training",
    ),
    "rounds": (lambda: M(X, n_hashes=0), ValueError, "n_hashes is 0"),
    "generate nothing": (lambda: M.generate(X[:, :0], 3), ValueError, "ids has no tokens"),
    "generate too long": (lambda: M.generate(X, 252), ValueError, "ids has 257 tokens"),
    "temperature": (lambda: M.generate(X, 3, temperature=-1), ValueError, "temperature is -1"),
    "top_k": (lambda: M.generate(X, 3, temperature=1, top_k=0), ValueError, "top_k is 0"),
    "top_p": (lambda: M.generate(X, 3, temperature=1, top_p=1.5), ValueError, "top_p is 1.5"),
    "config": (lambda: Reformer({"vocab_size": 3}), TypeError, "config must be a ReformerConfig"),
}


@pytest.mark.parametrize("call, error, message", CALLS.values(), ids=CALLS)
def test_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_start_is_sensible():
    m = Reformer(config(width=64, heads=4))
    x = ids(100)
    assert abs(m(x, labels=x).item() - math.log(VOCAB)) < 0.3
