"""lora_linears' outputs are differentiated one by one, as if each had a node of its own."""

import pytest
import torch

from pyfast.ops.lora import lora_linears
from pyfast.ops.lora_arguments import Projection


def projections(device, count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    return [
        Projection(
            random(8, 6).detach(), random(2, 6), random(8, 2), 0.5, random(8), random(8), random(8)
        )
        for _ in range(count)
    ]


def leaves(x, layers):
    return [x] + [
        tensor
        for layer in layers
        for tensor in (layer.lora_a, layer.lora_b, layer.bias, layer.lora_bias, layer.magnitude)
    ]


def gradients(tensors):
    """Return the gradients and clear them."""
    grads = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return grads


@pytest.fixture
def x(device):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 6, generator=generator).to(device, torch.float64).requires_grad_()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1,)], ids=str)
def test_backward_through_one_output_after_another(device, x, order, dropout_p):
    layers, seeds = projections(device), [7, 8, 9]
    together = lora_linears(x, layers, dropout_p=dropout_p, seeds=seeds)
    for i in order:
        together[i].square().sum().backward()
    shared = gradients(leaves(x, layers))
    for i in order:
        (alone,) = lora_linears(x, [layers[i]], dropout_p=dropout_p, seeds=[seeds[i]])
        alone.square().sum().backward()
    for grad, expected in zip(shared, gradients(leaves(x, layers)), strict=True):
        torch.testing.assert_close(grad, expected)  # None where no output asked for it


def test_a_second_backward_through_one_output_is_refused(device, x):
    q, k, _ = lora_linears(x, projections(device))
    q.sum().backward()
    for again in (q, q + k):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            again.sum().backward()
    k.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        k.sum().backward()


def test_a_graph_that_is_retained_stays_whole(device, x):
    layers = projections(device)
    q, k, _ = lora_linears(x, layers)
    q.sum().backward(retain_graph=True)
    once = gradients(leaves(x, layers))
    k.sum().backward()
    gradients(leaves(x, layers))
    q.sum().backward()
    for grad, expected in zip(gradients(leaves(x, layers)), once, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def test_a_tensor_changed_between_two_backwards_is_refused(device, x):
    layers = projections(device)
    q, k, _ = lora_linears(x, layers)
    q.sum().backward()
    with torch.no_grad():
        layers[1].lora_b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        k.sum().backward()


def test_tensors_are_let_go_with_the_last_output(device, x):
    outputs = lora_linears(x, projections(device))
    node = outputs[0].grad_fn
    for i, y in enumerate(outputs):
        y.sum().backward()
        assert (node.left is None) == (i == 2)
