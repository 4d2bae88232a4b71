"""Changes between the forward and the backward of reversible blocks."""

from functools import partial

import pytest
import torch
from helpers.reversible_nets import assert_same, loss_of, sequence, streams
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
    with pytest.raises(
        RuntimeError, match=r"that blocks\[0\]\[0\] \(F\) read was changed in place"
    ):
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
    """A tensor frozen since gets no gradient, as elsewhere in torch; the others' are the same."""
    torch.manual_seed(0)
    seq, x = (
        pyfast.ReversibleSequence(
            [(nn.Linear(8, 8), nn.Linear(8, 8))] * 2, exact=True, store=store
        ),
        streams(),
    )
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


def replaced(frozen: nn.Module) -> None:
    frozen.weight = nn.Parameter(torch.rand(8, 8), requires_grad=False)


@pytest.mark.parametrize(
    "change", [lambda frozen: frozen.weight.add_(1), replaced], ids=["in place", "replaced"]
)
def test_frozen_parameters_changed_are_noticed(change):
    """No graph holds frozen parameters, but the replay would compute something else."""
    f, g = (
        nn.Linear(8, 8).requires_grad_(False),
        pyfast.ChunkedFeedForward(nn.Linear(8, 8).requires_grad_(False), 2),
    )
    for frozen, name in ((f, r"blocks\[0\]\[0\] \(F\)"), (g.ff, r"blocks\[0\]\[1\] \(G\)")):
        y = pyfast.reversible([(partial(f), g)], *streams(), exact=True)
        with torch.no_grad():
            change(frozen)
        with pytest.raises(
            RuntimeError,
            match=f"a frozen parameter of {name} was changed in place or replaced since",
        ):
            sum(y).sum().backward()


@pytest.mark.parametrize("trained", [False, True])
def test_parameters_lent_for_a_call_are_missed_in_the_replay(trained):
    seq, x = sequence(2, exact=True).requires_grad_(trained), streams()
    lent = {name: parameter.detach() * 2 for name, parameter in seq.named_parameters()}
    y = torch.func.functional_call(seq, lent, tuple(x))
    with pytest.raises(
        RuntimeError, match=r"a frozen parameter of blocks\[1\]\[1\] \(G\) was .*replaced"
    ):
        sum(y).sum().backward()


CHANGES = {
    "an argument": lambda given, captured: given["of"][0].add_(1),
    "an argument with gradients": lambda given, captured: given["memory"].add_(1),
    "what is captured": lambda given, captured: captured[0].add_(1),
    "what is captured with gradients": lambda given, captured: captured[1].add_(1),
    "what a partial function was given": lambda given, captured: captured[2].add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_tensors_changed_in_place_are_noticed(change):
    weight, x = torch.rand(8, requires_grad=True), streams()
    given, captured = (
        {"of": [torch.rand(8)], "memory": weight * 1},
        (torch.rand(8), weight * 1, torch.rand(8)),
    )
    scale, derived, bias = captured
    f = partial(lambda bias, x, given: x * scale + derived + bias["of"], {"of": bias})
    blocks = [(f, lambda x, given: x * given["of"][0] + given["memory"])] * 2
    y = pyfast.reversible(blocks, *x, given, exact=True)
    with torch.no_grad():
        change(given, captured)
    with pytest.raises(
        RuntimeError, match=r"blocks\[1\]\[1\] \(G\) or another block was changed in place since"
    ):
        sum(y).sum().backward()


def test_what_a_function_changes_itself_is_its_own():
    count, steps, x = torch.zeros(()), torch.zeros(()), streams()

    def f(x, count):
        count.add_(1), steps.add_(1)
        return x.sin()

    y = pyfast.reversible([(f, f)] * 3, *x, count)
    sum(y).sum().backward()
    assert count == steps == 2 * 6


@pytest.mark.parametrize("of", ["f0", "ff"])
def test_another_mode_is_noticed(of):
    ff = pyfast.ChunkedFeedForward(nn.Sequential(nn.Linear(8, 8), nn.Dropout()), 2)
    seq = pyfast.ReversibleSequence([(nn.Dropout(), ff)], exact=True)
    y = seq(*streams())
    (seq.f0 if of == "f0" else ff).eval()
    with pytest.raises(
        RuntimeError, match=r"had training=True in the forward; train\(\) or eval\(\) must wait"
    ):
        sum(y).sum().backward()
