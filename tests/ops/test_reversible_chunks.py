"""Chunked functions in reversible blocks: each chunk is a step, computed twice only."""

import pytest
import torch
from helpers.reversible_nets import Attention, Mlp, assert_close, assert_same, step, stored, streams
from torch import nn

import pyfast
from pyfast._support.measure import peak_bytes


def sequence(n_blocks=3, width=8, chunk=2, dropout=0.0, dim=-2, **options):
    blocks = [
        (Attention(width, dropout), pyfast.ChunkedFeedForward(Mlp(width, dropout), chunk, dim))
        for _ in range(n_blocks)
    ]
    return pyfast.ReversibleSequence(blocks, **options)


@pytest.mark.parametrize("exact", [True, "int32"])
@pytest.mark.parametrize("dim", [-2, 0])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_stored_activations_to_the_bit(exact, dim, autocast, device):
    torch.manual_seed(0)
    seq = sequence(8, dropout=0.1, chunk=1 if dim == 0 else 2, dim=dim, exact=exact).to(device)
    x1, x2 = streams(device=device)
    assert_same(step(seq, x1, x2, autocast=autocast), stored(seq, x1, x2, autocast=autocast))


@pytest.mark.parametrize("which", ["x1", "x2", "neither"])
def test_streams_without_gradients(which, device):
    torch.manual_seed(0)
    seq = sequence(exact=False).to(device)
    x1, x2 = streams(grad=False, device=device)
    x1.requires_grad_(which == "x1"), x2.requires_grad_(which == "x2")
    assert_close(step(seq, x1, x2), stored(seq, x1, x2))


def test_a_frozen_chunk_passes_gradients_on(device):
    torch.manual_seed(0)
    seq = sequence(exact=True).to(device)
    for g in (seq.g0, seq.g1, seq.g2):
        g.requires_grad_(False)
    x1, x2 = streams(device=device)
    assert_same(step(seq, x1, x2), stored(seq, x1, x2))


def test_each_chunk_is_computed_twice():
    seq = sequence(1)
    step(seq, *streams())
    assert seq.g0.ff.calls == 2 * 3  # of 5 tokens, 2 at a time


def test_hooks_of_the_whole_are_called():
    torch.manual_seed(0)
    seq, seen = sequence(1, exact=True), []
    seq.g0.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x1, x2 = streams()
    assert_same(step(seq, x1, x2), stored(seq, x1, x2))
    assert seen == 3 * [x1.shape]  # forward, replay, and stored


@pytest.mark.parametrize("how", ["forward", "compiled", "hooked", "everywhere"])
def test_what_overrides_the_whole_is_called(how):
    seq, calls = sequence(1), []
    whole = seq.g0
    if how == "forward":
        whole.forward = lambda x: calls.append(1) or type(whole).forward(whole, x)
    elif how == "compiled":
        whole._compiled_call_impl = lambda x: calls.append(1) or whole._call_impl(x)
    hook = None
    if how == "hooked":
        hook = whole.register_forward_pre_hook(lambda module, args: calls.append(1))
    elif how == "everywhere":
        hook = nn.modules.module.register_module_forward_hook(
            lambda m, *_: calls.append(1) if m is whole else None
        )
    step(seq, *streams())
    if hook:
        hook.remove()
    assert len(calls) == 2


class TokenByToken(nn.Module):
    """A module that asks for chunks by the method of its class."""

    def __init__(self):
        super().__init__()
        self.token, self.calls = Mlp(8), 0

    def forward(self, x):
        self.calls += 1
        return torch.cat([self.token(token) for token in x.split(1, 1)], 1)

    def reversible_chunks(self, x):
        return self.token, 1, [1] * x.shape[1]


def test_any_module_can_ask_for_chunks():
    torch.manual_seed(0)
    g = TokenByToken()
    seq, x = pyfast.ReversibleSequence([(Attention(8), g)], exact=True), streams()
    assert_same(step(seq, *x), stored(seq, *x))
    assert g.calls == 0 and g.token.calls == 3 * 5  # forward, replay, and stored


def test_wrappers_are_called_though_they_pass_attributes_on():
    class Wrapper(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped, self.calls = wrapped, 0

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.wrapped, name)

        def forward(self, x):
            self.calls += 1
            return 2 * self.wrapped(x)

    seq = sequence(1)
    seq.g0 = Wrapper(seq.g0)
    step(seq, *streams())
    assert seq.g0.calls == 2


def test_a_subclass_is_called():
    class Doubled(pyfast.ChunkedFeedForward):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    g = Doubled(Mlp(8), 2)
    x = streams()
    _, y2 = pyfast.reversible([(torch.zeros_like, g)], *x, exact=False)
    assert torch.equal(y2, x[1] + g(x[0]))


def test_a_dimension_that_is_not_there_is_named():
    for x, dim in ((torch.tensor(1.0), -2), (torch.ones(3), -2), (torch.ones(3, 4), 2)):
        g = pyfast.ChunkedFeedForward(nn.Identity(), 1, dim)
        with pytest.raises(ValueError, match=rf"dim is {dim} and x has shape"):
            pyfast.reversible([(torch.sin, g)], x, x)


def test_a_wrong_chunk_is_named():
    seq = sequence(1)
    seq.g0.ff = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"blocks\[0\]\[1\] \(G\) returned"):
        seq(*streams())


def test_gradcheck():
    seq = sequence(2, width=4, exact=False).double()
    x1, x2 = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameters = tuple(seq.parameters())
    assert torch.autograd.gradcheck(lambda x1, x2, *_: seq(x1, x2), (x1, x2, *parameters))


def peak_of_a_step(n_chunks):
    """Return the peak memory of a step, beyond parameters and their gradients."""
    g = nn.Sequential(nn.Linear(128, 1024), nn.GELU(), nn.Linear(1024, 128))
    chunked = pyfast.ChunkedFeedForward(g, 4096 // n_chunks)
    seq = pyfast.ReversibleSequence([(nn.Linear(128, 128), chunked)], exact=False)
    x = torch.randn(1, 4096, 128, requires_grad=True)
    for t in (x, *seq.parameters()):
        t.grad = torch.zeros_like(t)
    return peak_bytes(lambda: sum(seq(x, x)).sum().backward()), sum(
        p.nbytes for p in g.parameters()
    )


def test_memory_is_of_one_chunk():
    (whole, _), (few, nbytes), (many, _) = map(peak_of_a_step, (1, 8, 64))
    hidden = 4096 * 1024 * 4
    assert whole - few > 1.5 * hidden
    assert many < few + nbytes  # one copy of the gradients of parameters, not one for each chunk


def test_weights_shared_across_depth():
    torch.manual_seed(0)
    f, g = Attention(8), pyfast.ChunkedFeedForward(Mlp(8, 0.1), 2)
    seq, x = pyfast.ReversibleSequence([(f, g)] * 3, exact=True), streams()
    assert_same(step(seq, *x), stored(seq, *x))
