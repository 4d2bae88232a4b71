"""What is changed between the forward and the backward of reversible blocks."""

import pytest
import torch
from reversible_nets import assert_same, loss_of, sequence, streams
from torch import nn

import pyfast


def test_outputs_and_parameters_changed_in_place_are_noticed():
    seq, x = sequence(2), streams()
    y1, y2 = seq(*x)
    loss = loss_of(y1, y2)
    with torch.no_grad():
        y1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = loss_of(*seq(*x))
    with torch.no_grad():
        seq.f0.out.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"that blocks\[0\]\[0\] \(F\) read was changed in place"):
        loss.backward()


def test_a_replay_must_read_the_same():
    weights, calls = [torch.rand(8, requires_grad=True) for _ in range(2)], []

    def f(x):
        calls.append(1)
        return x * weights[len(calls) > 1]

    y = pyfast.reversible([(f, torch.sin)], *streams())
    with pytest.raises(RuntimeError, match=r"blocks\[0\]\[0\] \(F\) read other tensors"):
        sum(y).sum().backward()


@pytest.mark.parametrize("store", [False, True])
def test_frozen_since(store):
    """As elsewhere in torch: no gradient for what does not want one any more, the same as ever for the rest."""
    torch.manual_seed(0)
    seq, x = pyfast.ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8))] * 2, exact=True, store=store), streams()
    wants = [*x, *seq.g0.parameters(), seq.f0.bias]
    wanted = torch.autograd.grad(loss_of(*seq(*x)), wants)
    loss = loss_of(*seq(*x))
    seq.f0.weight.requires_grad_(False)
    loss.backward()
    assert seq.f0.weight.grad is None
    assert_same([t.grad for t in wants], wanted)
    loss = loss_of(*(seq(*x)))
    seq.f0.requires_grad_(False), seq.g0.requires_grad_(False)
    assert_same(torch.autograd.grad(loss, x), wanted[:2])
