"""Reversible blocks within a network: graphs, hooks, autocast, arguments, compilers."""

import weakref

import pytest
import torch
from helpers.reversible_nets import (
    Attention,
    Mlp,
    assert_close,
    assert_same,
    loss_of,
    sequence,
    step,
    stored,
    streams,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import pyfast


def test_two_forwards_before_a_backward():
    seq, x, other = sequence(3, dropout=0.1, exact=True), streams(), streams()
    wanted = step(seq, *x)
    torch.manual_seed(7)
    first = seq(*x)
    second = seq(*other)
    parameters = list(seq.parameters())
    torch.autograd.grad(loss_of(*second), [*other, *parameters])
    assert_same(torch.autograd.grad(loss_of(*first), [*x, *parameters]), wanted[2:])


def test_a_graph_is_kept_on_demand():
    seq, x = sequence(3, dropout=0.1, exact=True), streams()
    wanted = step(seq, *x)
    torch.manual_seed(7)
    loss, wants = loss_of(*seq(*x)), [*x, *seq.parameters()]
    upper = list(seq.g2.parameters())
    # Only the last block's backward runs.
    assert_same(torch.autograd.grad(loss, upper, retain_graph=True), wanted[-len(upper) :])
    for keep in (True, False):
        assert_same(torch.autograd.grad(loss, wants, retain_graph=keep), wanted[2:])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wants)


def test_a_backward_inside_another_of_the_same_graph():
    seq, x, inside = sequence(3, exact=True), streams(), []
    loss, wants = loss_of(*seq(*x)), [*x, *seq.parameters()]
    wanted = torch.autograd.grad(loss, wants, retain_graph=True)

    def again(_):
        if not inside:
            inside.append(None)
            inside[0] = torch.autograd.grad(loss, wants, retain_graph=True)

    seq.f1.out.weight.register_hook(again)
    assert_same(torch.autograd.grad(loss, wants, retain_graph=True), wanted)
    assert_same(inside[0], wanted)


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_input(autocast):
    seq, x = sequence(3, exact=True), streams(grad=False)
    found = step(seq, *x, autocast=autocast)
    assert_same(found, stored(seq, *x, autocast=autocast))
    assert all(grad.count_nonzero() for grad in found[2:])


def test_frozen_blocks_below():
    seq, x = sequence(3, exact=True), streams(grad=False)
    for half in (seq.f0, seq.g0, seq.f1):
        half.requires_grad_(False)
    calls = []
    seq.f0.register_forward_hook(lambda *_: calls.append(0))
    found = step(seq, *x)
    assert calls == [0]  # nothing below wants a gradient
    assert_same(found, stored(seq, *x))
    seq.requires_grad_(False)
    assert not any(y.requires_grad for y in seq(*x))


def test_one_frozen_stream():
    seq, x = sequence(2, exact=True), streams()
    x[0].requires_grad_(False)
    assert_same(step(seq, *x), stored(seq, *x))


@pytest.mark.parametrize("frozen", [False, True])
def test_lora_inside(frozen):
    seq, x = sequence(3, exact=True), streams(grad=not frozen)
    pyfast.add_lora(seq, pyfast.LoRAConfig(r=2, dropout=0.1, targets="all-linear"))
    for name, parameter in seq.named_parameters():
        if "lora_b" in name.lower():
            nn.init.normal_(parameter, std=0.1)
    trained = [p for p in seq.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(seq.parameters()))
    found = step(seq, *x)
    assert_same(found, stored(seq, *x))
    assert all(grad.count_nonzero() for grad in found[2:])


def test_backward_outside_autocast_or_inside():
    seq, x = sequence(3, exact=True), streams()
    found = step(seq, *x, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = step(seq, *x, autocast=True)
        # A forward in float32, with autocast on around it.
        assert_same(step(seq, *x, autocast=False), stored(seq, *x, autocast=False))
    assert_same(inside, found)
    assert not torch.is_autocast_enabled("cpu")


def test_a_seed_is_a_seed():
    def losses():
        torch.manual_seed(3)
        seq, x = sequence(2, dropout=0.3), streams()
        optimizer = torch.optim.SGD(seq.parameters(), 0.01)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(*seq(*x))
            before = torch.get_rng_state()
            loss.backward()
            assert torch.equal(torch.get_rng_state(), before)
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses() == losses() and len(set(losses())) == 3


def test_weights_shared_across_depth():
    f, g = Attention(8, 0.1), Mlp(8, 0.1)
    seq, x = pyfast.ReversibleSequence([(f, g)] * 4, exact=True), streams()
    for autocast in (False, True):
        assert_same(step(seq, *x, autocast=autocast), stored(seq, *x, autocast=autocast))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around(reentrant):
    seq, x = sequence(2, dropout=0.1, exact=True), streams()
    wanted = step(seq, *x)
    torch.manual_seed(7)
    y = checkpoint(seq, *x, use_reentrant=reentrant)
    loss_of(*y).backward()
    assert_same([t.grad for t in (*x, *seq.parameters())], wanted[2:])


def test_checkpoint_inside():
    f, g = Attention(8, 0.1), Mlp(8, 0.1)
    plain = pyfast.ReversibleSequence([(f, g)] * 2, exact=True)
    inside = pyfast.ReversibleSequence(
        [(f, lambda x: checkpoint(g, x, use_reentrant=False))] * 2, exact=True
    )
    x, wanted = streams(), [*f.parameters(), *g.parameters()]
    grads = []
    for seq in (plain, inside):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(loss_of(*seq(*x)), [*x, *wanted]))
    assert_same(*grads)


def test_one_inside_another():
    inner = sequence(2, width=4, dropout=0.1, exact=True)
    seq = pyfast.ReversibleSequence(
        [(Mlp(8), lambda x: torch.cat(inner(*x.chunk(2, -1)), -1))] * 2, exact=True
    )
    x, wants = streams(), [*seq.parameters(), *inner.parameters()]
    grads = []
    for seq.store in (False, True):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(loss_of(*seq(*x)), [*x, *wants]))
    assert_same(*grads)


# --- hidden states ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_have_gradients(dtype):
    seq, x = sequence(4, dropout=0.1, exact=True).to(dtype), streams(dtype=dtype)
    losses = {
        "all": lambda y1, y2, hidden: loss_of(y1, y2) + sum(loss_of(*h) / 7 for h in hidden),
        "one below": lambda y1, y2, hidden: hidden[1][0].float().square().sum(),
    }
    for loss in losses.values():
        results = []
        for seq.store in (False, True):
            torch.manual_seed(7)
            y1, y2, hidden = seq(*x, return_hidden=True)
            assert hidden[-1][0] is y1 and hidden[-1][1] is y2 and len(hidden) == 4
            grads = torch.autograd.grad(
                loss(y1, y2, hidden), [*x, *seq.parameters()], allow_unused=True
            )
            results.append(
                [*sum(hidden, ()), *(torch.zeros(()) if grad is None else grad for grad in grads)]
            )
        assert_same(*results)


# --- what F and G are given, and read ---


def test_arguments():
    mask, scale = torch.rand(2, 5, 8), torch.rand((), requires_grad=True)
    memory = (torch.rand(8, requires_grad=True) * 2).requires_grad_()  # not a leaf
    memory.retain_grad()

    def f(x, mask, *, scale, extra, bias=None):
        return x.sin() * mask * scale["of"] + extra

    def g(x, mask, *, scale, bias):
        return x.cos() * mask + bias * scale["of"]

    def run(store):
        extras = [{"extra": memory * i} for i in range(3)]
        named = {"scale": {"of": scale}, "f_kwargs": extras, "g_kwargs": {"bias": memory}}
        y = pyfast.reversible([(f, g)] * 3, *x, mask, exact=True, store=store, **named)
        memory.grad = scale.grad = None
        loss_of(*y).backward(retain_graph=True)
        return memory.grad, scale.grad

    x = streams(grad=False)
    assert_close(run(False), run(True), 1e-6)


def test_whatever_is_read_gets_its_gradient():
    class Holder:
        def __init__(self):
            self.linear = nn.Linear(8, 8)

        def method(self, x):
            return self.linear(x)

    holder, net, captured = Holder(), Mlp(8), torch.rand(8, requires_grad=True)
    constant = nn.Parameter(torch.rand(2, 5, 8))
    derived = captured.exp()
    blocks = [
        (holder.method, lambda x: net(x) * captured + derived),
        (lambda x: constant, lambda x: x),
    ]
    wants = [*holder.linear.parameters(), *net.parameters(), captured, constant]
    x, grads = streams(grad=False), []
    for store in (False, True):
        y = pyfast.reversible(blocks, *x, exact=True, store=store)
        grads.append(torch.autograd.grad(loss_of(*y), wants, retain_graph=True))
    assert_close(*grads, 1e-6)


def test_views_changed_in_place_inside():
    scale, shift = torch.rand(4, requires_grad=True), torch.rand(2, 5, 4, requires_grad=True)

    def f(x):
        x = x.sin()
        x[..., 4:] *= scale
        x[..., :4] = shift
        return x

    x, grads = streams(), []
    for store in (False, True):
        y = pyfast.reversible([(f, f)] * 2, *x, exact=True, store=store)
        grads.append(torch.autograd.grad(loss_of(*y), [*x, scale, shift]))
    assert_same(*grads)


@pytest.mark.parametrize("store", [False, True])
def test_hooks_see_the_whole_gradient_once(store):
    f, g = Mlp(8), Mlp(8)
    seq, x = pyfast.ReversibleSequence([(f, g)] * 3, exact=True, store=store), streams()
    plain = dict(zip(map(id, (*x, *seq.parameters())), step(seq, *x)[2:]))
    seen, fired = [], []
    f.up.weight.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
    g.register_full_backward_hook(lambda *_: fired.append(1))
    torch.manual_seed(7)
    loss_of(*seq(*x)).backward()
    assert len(seen) == 1 and len(fired) == 3
    assert_same([seen[0], f.up.weight.grad], [plain[id(f.up.weight)], 2 * plain[id(f.up.weight)]])


class Lsh(nn.Module):
    """Attention that with `keeps` hands its buckets and seed on to the replay."""

    def __init__(self, keeps: bool):
        super().__init__()
        self.keeps, self.project, self.hashed = keeps, nn.Linear(16, 16), []

    def forward(self, x, kept=None):
        kept = {} if kept is None else kept
        qk = self.project(x).unflatten(-1, (2, 8)).transpose(1, 2)
        seed = kept.setdefault("seed", len(self.hashed))  # a new one at each call
        self.hashed += [] if "buckets" in kept else [seed]
        y, buckets = pyfast.lsh_attention(
            qk,
            qk,
            chunk_length=16,
            n_buckets=4,
            seed=seed,
            dropout_p=0.1,
            buckets=kept.get("buckets"),
            return_buckets=True,
        )
        kept["buckets"] = buckets
        return y.transpose(1, 2).flatten(2)


def test_buckets_are_handed_to_the_replay():
    differs = []
    for keeps in (True, False):
        seq = pyfast.ReversibleSequence([(Lsh(keeps), Mlp(16))] * 2, exact=True)
        x = [torch.randn(2, 64, 16, requires_grad=True) for _ in range(2)]
        found = step(seq, *x)
        assert len(seq.f0.hashed) == (2 if keeps else 4)
        seq.f0.hashed.clear()
        wanted = stored(seq, *x)
        differs.append(any(not torch.equal(a, b) for a, b in zip(found, wanted)))
    assert differs == [False, True]


def test_what_the_user_can_see_is_not_changed():
    given = []

    def f(x):
        given.append((x, x.detach().clone()))
        return x.sin()

    x = streams()
    before = [t.detach().clone() for t in x]
    for exact in (False, True, "int32"):
        y = pyfast.reversible([(f, f)] * 3, *x, exact=exact)
        outputs = [t.detach().clone() for t in y]
        d = [torch.ones_like(t) for t in y]
        torch.autograd.backward(y, d)
        assert_same([*x, *y, *d], [*before, *outputs, *(torch.ones_like(t) for t in y)])
    assert len(given) == 36 and all(torch.equal(*pair) for pair in given)


def test_nothing_is_held_longer_than_needed():
    class Held:
        pass

    def f(x, held, kept):
        kept["held"] = held
        return x.sin()

    f.keeps = True
    x = streams()
    for backward in (False, True):
        held = Held()
        y = pyfast.reversible([(f, lambda x, held: x.cos())] * 2, *x, held, exact=True)
        alive = weakref.ref(held)
        del held
        assert alive()
        if backward:
            sum(y).sum().backward()  # the outputs live on
        else:
            del y
        assert alive() is None


def test_streams_are_dropped_after_a_backward():
    """They are, though outputs keep the graph alive. The last call reads an output itself."""
    storages = []

    def f(x):
        storages.append(StorageWeakRef(x.untyped_storage()))
        return x.sin()

    y = pyfast.reversible([(f, f)] * 2, *streams(), exact=True)
    storages.clear()
    sum(y).sum().backward(retain_graph=True)
    assert [storage.expired() for storage in storages] == [False, True, True, True]


def test_only_the_last_outputs_are_saved():
    seq, x, packed = sequence(3, dropout=0.1, exact=True), streams(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = seq(*x)
    assert [t.data_ptr() for t in packed] == [t.data_ptr() for t in y]


def test_inference_mode_and_meta_tensors():
    seq, x = sequence(2, exact=True), streams(grad=False)
    wanted = seq(*x)
    with torch.inference_mode():
        assert_same(seq(*x), wanted)
    y = pyfast.reversible([(torch.sin, torch.sin)], *(t.to("meta") for t in x), exact=True)
    assert y[0].is_meta and y[0].shape == x[0].shape


# --- compilers ---


def test_compiled_functions():
    seq, x = sequence(2, exact=True), streams()
    seq.f0 = torch.compile(seq.f0, fullgraph=True)
    seq.g1.compile()
    found = step(seq, *x, autocast=True)
    assert_same(found, stored(seq, *x, autocast=True))


def test_a_compiled_model_around():
    """Compiled functions run compiled in forward and replay; the others run eagerly in both."""
    runs = []

    def backend(graph, _):
        return lambda *args: runs.append(len(args)) or graph(*args)

    seq, x = sequence(2, exact=True), streams()
    wanted = torch.autograd.grad(
        loss_of(*(torch.relu(y) for y in seq(x[0] * 2, x[1]))), wants := [*x, *seq.parameters()]
    )
    seq.f0.compile(backend=backend)
    model = torch.compile(lambda a, b: [torch.relu(y) for y in seq(a * 2, b)], backend="eager")
    assert_same(torch.autograd.grad(loss_of(*model(*x)), wants), wanted)
    assert len(runs) == 2
