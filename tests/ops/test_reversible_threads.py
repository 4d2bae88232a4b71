"""Reversible blocks in several threads at once: gradients are those of one thread."""

import threading

import torch
from helpers.reversible_nets import assert_same, loss_of, sequence, step, streams
from torch import nn

import pyfast


def in_threads(work, count=3):
    """Call work(i) in several threads at once, and check that all return."""
    done = []
    threads = [threading.Thread(target=lambda i=i: done.append((work(i), i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == count


def test_networks():
    networks = [(sequence(4, exact=True), streams()) for _ in range(3)]
    wanted = [step(seq, *x)[2:] for seq, x in networks]

    def train(i):
        seq, x = networks[i]
        for _ in range(5):
            assert_same(torch.autograd.grad(loss_of(*seq(*x)), [*x, *seq.parameters()]), wanted[i])

    in_threads(train)


def test_shared_parameters():
    """Their nodes in the graph are shared too. No replay may touch them."""
    seq, seen = (
        pyfast.ReversibleSequence([(nn.Linear(32, 32), nn.Linear(32, 32))] * 2, exact=True),
        [],
    )
    x, weight = streams(32, grad=False), seq.f0.weight
    weight.register_hook(lambda grad: seen.append(1) or grad * 2)
    (wanted,) = torch.autograd.grad(loss_of(*seq(*x)), [weight])

    def train(_):
        for _ in range(100):
            assert_same(torch.autograd.grad(loss_of(*seq(*x)), [weight]), [wanted])

    in_threads(train)
    assert len(seen) == 1 + 3 * 100


def test_one_graph():
    seq, x = sequence(6, exact=True), streams()
    loss, wants = loss_of(*seq(*x)), [*x, *seq.parameters()]
    wanted = torch.autograd.grad(loss, wants, retain_graph=True)

    def backward(_):
        for _ in range(10):
            assert_same(torch.autograd.grad(loss, wants, retain_graph=True), wanted)

    in_threads(backward)


def test_tensors_of_another_thread():
    """Autograd counts operations by thread, and the other thread is ahead."""
    weight, made, x, grads = torch.rand(8, 8, requires_grad=True), [], streams(grad=False), []

    def make(_):
        for _ in range(100):
            weight * 1
        made.append(weight.exp() / 50)

    def use(_):
        blocks = [(lambda x: x @ made[0], lambda x: x.sin() @ made[0])] * 3
        for store in (False, True):
            y = pyfast.reversible(blocks, *x, exact=True, store=store)
            grads.append(torch.autograd.grad(loss_of(*y), [weight], retain_graph=True))

    in_threads(make, 1)
    in_threads(use, 1)
    assert_same(*grads)
