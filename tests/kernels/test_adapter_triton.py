"""The Triton kernels of the adapter against the definition in plain PyTorch.

test_nf4_triton.py says how and where they run.
"""

from functools import partial

import pytest
import torch
from helpers.tolerance import assert_as_exact_as_torch
from helpers.triton_inputs import DEVICE, DTYPES, native
from helpers.triton_interpreter import assert_passes

from pyfast import reference
from pyfast._support import registry

ALL = [True] * 5
run_adapter = partial(registry.run_kernel, "adapter")
run_backward = partial(registry.run_kernel, "adapter_backward")


@pytest.mark.long
@pytest.mark.needs("no kernels")
def test_the_kernels_are_right_in_the_interpreter():
    assert_passes("kernels/test_adapter_triton.py")


def random(*shape, dtype=torch.float32):
    """Return multiples of 1/8, so that no hidden value's sign depends on the order of its sum.

    relu asks for that sign.
    """
    return (torch.randn(*shape).clamp(-4, 4) * 8).round().div(8).to(DEVICE, dtype)


def inputs(m, in_features, bottleneck, out, dtype, weights=None, bias=True):
    weights = weights or dtype
    shapes = ((bottleneck, in_features), (bottleneck,), (out, bottleneck), (out,))
    down, down_bias, up, up_bias = (random(*shape, dtype=weights) for shape in shapes)
    down_bias, up_bias = (down_bias, up_bias) if bias else (None, None)
    return random(m, in_features, dtype=dtype), down / 8, down_bias, up / 4, up_bias


def compare(x, *parameters, residual=None, activation="relu", scaling=0.7, needs=ALL):
    """Assert that y and all gradients are as exact as the definition allows."""
    down, down_bias, up, _ = parameters
    dy = random(x.shape[0], up.shape[0], dtype=x.dtype if residual is None else residual.dtype)
    exact = [None if t is None else t.double() for t in (dy, x, *parameters, residual)]
    y = run_adapter(x, *parameters, residual, activation, scaling)
    plain = reference.adapter_op(x, *parameters, residual, activation, scaling)
    assert_as_exact_as_torch(
        y, plain, reference.adapter_op(*exact[1:6], exact[6], activation, scaling)
    )
    args = (residual is None, activation, scaling, needs)
    grads = run_backward(dy, x, down, down_bias, up, *args)
    # Hidden values, gradients and the result are rounded to x's type.
    allowed = 4 * torch.finfo(x.dtype).eps
    exact_grads = reference.adapter_backward_op(*exact[:5], *args)
    for grad, true in zip(grads, exact_grads, strict=True):
        error = (grad.double() - true).norm() / true.norm().clamp_min(1e-300) if true.numel() else 0
        assert grad.shape == true.shape and error <= allowed, error


@native
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_is_right(activation, dtype):
    compare(*inputs(37, 70, 19, 70, dtype), activation=activation)


@native
@pytest.mark.parametrize(
    "sizes", [(1, 16, 16, 16), (3, 5, 1, 7), (130, 33, 70, 50), (17, 40, 200, 40)], ids=str
)
def test_odd_sizes_are_right(sizes):
    m, _, _, out = sizes
    compare(*inputs(*sizes, torch.float32), residual=random(m, out))
    compare(*inputs(*sizes, torch.float32, bias=False), residual=random(m, out))


@native
def test_parameters_may_be_fp32_beside_16_bits():
    compare(*inputs(20, 48, 16, 48, torch.float16, weights=torch.float32), residual=random(20, 48))


@native
@pytest.mark.parametrize("wanted", range(5))
def test_only_needed_gradients_are_computed(wanted):
    compare(*inputs(20, 48, 16, 48, torch.float32), needs=[i == wanted for i in range(5)])


@native
def test_split_weight_gradients_are_right_and_repeatable():
    """The sum over rows is split among programs, and the parts are added up in their order."""
    parameters = inputs(1100, 24, 8, 24, torch.float32)
    compare(*parameters)
    args = (random(1100, 24), parameters[0], *parameters[1:4], True, "silu", 0.7, ALL)
    assert all(map(torch.equal, run_backward(*args), run_backward(*args)))


@native
@pytest.mark.parametrize("bottleneck", [16, 200])
def test_not_finite_rows_stay_in_their_rows(bottleneck):
    x, *parameters = inputs(20, 48, bottleneck, 48, torch.float32)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    y = run_adapter(x, *parameters, None, "relu", 1.0)
    clean = [i for i in range(20) if i not in (3, 7)]
    assert y[3].isnan().all() and y[clean].isfinite().all()
    expected = reference.adapter_op(x, *parameters, None, "relu", 1.0)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@native
def test_no_rows_give_empty_results():
    x, *parameters = inputs(0, 48, 16, 48, torch.float32)
    assert run_adapter(x, *parameters, None, "relu", 1.0).shape == (0, 48)
    grads = run_backward(x, x, *parameters[:3], True, "relu", 1.0, ALL)
    assert [list(g.shape) for g in grads] == [[0, 48], [16, 48], [16], [48, 16], [48]]
    assert not any(g.any() for g in grads)
