"""The loss without its logits, the feed-forward without its hidden: values, gradients, memory, bad input."""

import math

import pytest
import torch
from helpers.tolerance import assert_as_exact_as_torch
from torch import nn

import pyfast
from pyfast import reference
from pyfast._support.measure import peak_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(n=50, width=24, vocabulary=70, dtype=torch.float32, device="cpu", bias=True):
    hidden, weight = (
        torch.randn(2, n, width, device=device),
        torch.randn(vocabulary, width, device=device) / 4,
    )
    labels = torch.randint(vocabulary, (2, n), device=device)
    labels[torch.rand(2, n, device=device) < 0.2] = -100
    given = [hidden, weight, *([torch.randn(vocabulary, device=device)] if bias else [])]
    return [t.to(dtype).requires_grad_() for t in given], labels


def run(function, given, labels, **options):
    given = [t.detach().requires_grad_(t.requires_grad) for t in given]
    hidden, weight, *bias = given
    loss = function(hidden, weight, labels, bias=bias[0] if bias else None, **options)
    return [loss, *torch.autograd.grad(loss * 1.5, [t for t in given if t.requires_grad])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, None])
def test_cross_entropy(device, dtype, chunk):
    for bias in (True, False):
        for reduction in ("mean", "sum"):
            given, labels = problem(dtype=dtype, device=device, bias=bias)
            options = {"reduction": reduction}
            ours = run(pyfast.chunked_cross_entropy, given, labels, chunk=chunk, **options)
            torchs = run(reference.chunked_cross_entropy, given, labels, **options)
            exact = run(
                reference.chunked_cross_entropy,
                [t.detach().double().requires_grad_() for t in given],
                labels,
            )
            exact = exact if reduction == "mean" else [t * (labels != -100).sum() for t in exact]
            for a, b, c in zip(ours, torchs, exact, strict=True):
                assert_as_exact_as_torch(a, b, c)


def test_cross_entropy_of_nothing(device):
    given, labels = problem(device=device)
    for other in (labels.fill_(-100), labels[:, :0]):
        some = [given[0][:, : other.shape[1]], *given[1:]]
        loss = pyfast.chunked_cross_entropy(some[0], some[1], other, bias=some[2])
        assert loss == 0
        for t, grad in zip(given, torch.autograd.grad(loss, given)):
            assert grad.shape == t.shape and not grad.any()


def test_what_is_frozen_costs_nothing(device):
    for frozen in (0, 1, 2):
        given, labels = problem(device=device)
        given[frozen].requires_grad_(False)
        torch.testing.assert_close(
            run(pyfast.chunked_cross_entropy, given, labels, chunk=16),
            run(reference.chunked_cross_entropy, given, labels),
        )


def test_no_gradients_under_no_grad(device):
    given, labels = problem(device=device)
    with torch.no_grad():
        assert not pyfast.chunked_cross_entropy(*given[:2], labels).requires_grad


def test_backward_twice_and_second_derivative(device):
    given, labels = problem(device=device)
    loss = pyfast.chunked_cross_entropy(*given[:2], labels, chunk=16)
    grads = [torch.autograd.grad(loss, given[:2], retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *grads))
    (d,) = torch.autograd.grad(loss.square(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d.sum().backward()


def test_gradcheck():
    given, labels = problem(n=6, width=3, vocabulary=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: pyfast.chunked_cross_entropy(h, w, labels, bias=b, chunk=4), given
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(device, dynamic):
    compiled = torch.compile(pyfast.chunked_cross_entropy, fullgraph=True, dynamic=dynamic)
    for n in (20, 50):
        given, labels = problem(n=n, device=device)
        options = {"chunk": 16}
        torch.testing.assert_close(
            run(compiled, given, labels, **options),
            run(pyfast.chunked_cross_entropy, given, labels, **options),
        )


def test_autocast(device):
    given, labels = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = pyfast.chunked_cross_entropy(*given[:2], labels)
    assert loss.dtype == torch.float32
    lowered = [t.detach().bfloat16() for t in given[:2]]
    assert torch.equal(loss, pyfast.chunked_cross_entropy(*lowered, labels))
    loss.backward()
    assert given[0].grad.dtype == given[1].grad.dtype == torch.float32


def test_autocast_after_a_layer_that_it_lowered(device):
    """The usual case: hidden has autocast's dtype already, and the weight is float32."""
    (hidden, weight, bias), labels = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = pyfast.chunked_cross_entropy(hidden.bfloat16(), weight, labels, bias=bias)
        assert torch.equal(loss, pyfast.chunked_cross_entropy(hidden, weight, labels, bias=bias))
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_logits_are_never_whole():
    """Of 4096 tokens and 8192 words, 134 MB in float32: one chunk of them, and gradients."""
    given, labels = problem(n=2048, width=64, vocabulary=8192, bias=False)
    peak = peak_bytes(lambda: pyfast.chunked_cross_entropy(*given, labels, chunk=256).backward())
    chunk, grads = 256 * 8192 * 4, sum(t.nbytes for t in given)
    assert peak < chunk + 3 * grads + (1 << 20)
    with torch.no_grad():
        assert (
            peak_bytes(lambda: pyfast.chunked_cross_entropy(*given, labels, chunk=256))
            < 1.1 * chunk
        )
    assert peak_bytes(lambda: reference.chunked_cross_entropy(*given, labels).backward()) > 4 * peak


def test_half_precision_keeps_the_gradient_of_a_mean_over_many_tokens(device):
    hidden, weight = (torch.randn(shape, device=device).half() for shape in ((1 << 16, 8), (11, 8)))
    labels, scale = torch.randint(11, (1 << 16,), device=device), 2.0**16

    def gradient(function, hidden):
        hidden = hidden.detach().requires_grad_()
        (scale * function(hidden, weight.to(hidden.dtype), labels)).backward()
        return hidden.grad.double()

    exact = gradient(reference.chunked_cross_entropy, hidden.double())
    for function in (pyfast.chunked_cross_entropy, reference.chunked_cross_entropy):
        assert (gradient(function, hidden) - exact).norm() < 2e-3 * exact.norm()


def test_ignored_tokens_may_be_anything(device):
    hidden, weight = (
        torch.randn(6, 4, device=device),
        torch.randn(5, 4, device=device, requires_grad=True),
    )
    labels = torch.tensor([1, -100, 3, 0, -100, 2], device=device)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    hidden[1], hidden[4] = math.nan, math.inf
    hidden.requires_grad_()
    loss = pyfast.chunked_cross_entropy(hidden, weight, labels, chunk=4)
    assert abs(loss - wanted) < 1e-5
    (d_hidden,) = torch.autograd.grad(loss, [hidden])
    assert d_hidden.isfinite().all() and not d_hidden[[1, 4]].any()


# --- feed-forward ---


def feed_forward(width=16, dropout=0.0):
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
    )


@pytest.mark.parametrize("chunk", [1, 7, 50, 100])
def test_feed_forward(device, chunk):
    ff, x = feed_forward().to(device), torch.randn(2, 50, 16, device=device, requires_grad=True)
    layer, wanted = pyfast.ChunkedFeedForward(ff, chunk), [x, *ff.parameters()]
    found = [[f(x), *torch.autograd.grad(f(x).square().sum(), wanted)] for f in (ff, layer)]
    torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ff(x))
    other = pyfast.chunked_feed_forward(lambda t: t.cumsum(-1), x, chunk, dim=1)
    torch.testing.assert_close(other, x.cumsum(-1))


def test_feed_forward_draws_the_same_again(device):
    """Dropout in the backward is that of the forward: the gradient of a sum is what it multiplied by."""
    x = torch.randn(40, 16, device=device, requires_grad=True)
    y = pyfast.chunked_feed_forward(nn.Dropout(0.5), x, 8)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x * dx) and 0 < (dx == 0).float().mean() < 1


def test_feed_forward_keeps_a_chunk_s_memory():
    ff, x = feed_forward(64), torch.randn(4096, 64, requires_grad=True)
    whole, chunked = (
        peak_bytes(lambda run=run: run(x).sum().backward())
        for run in (ff, lambda t: pyfast.chunked_feed_forward(ff, t, 128))
    )
    assert chunked < 0.5 * whole


HIDDEN, WEIGHT, LABELS = torch.randn(5, 8), torch.randn(20, 8), torch.arange(5)
BAD = {
    "hidden's width": (
        lambda: loss(HIDDEN[:, 1:]),
        ValueError,
        r"hidden has shape \[5, 7\]; its last dimension",
    ),
    "weight 1-D": (
        lambda: loss(weight=WEIGHT[0]),
        ValueError,
        r"weight has shape \[8\]; it must be \[vocabulary",
    ),
    "weight's dtype": (
        lambda: loss(weight=WEIGHT.half()),
        TypeError,
        "weight is torch.float16 but hidden is",
    ),
    "labels' shape": (
        lambda: loss(labels=LABELS[1:]),
        ValueError,
        r"labels has shape \[4\]; it must be \[5\]",
    ),
    "labels' dtype": (
        lambda: loss(labels=LABELS.int()),
        TypeError,
        "labels is torch.int32; it must be torch.int64",
    ),
    "labels too high": (
        lambda: loss(labels=LABELS + 18),
        ValueError,
        "labels holds numbers from 18 to 22; they must be 0",
    ),
    "labels negative": (
        lambda: loss(labels=LABELS - 1),
        ValueError,
        "labels holds numbers from -1 to 3",
    ),
    "bias's shape": (
        lambda: loss(bias=HIDDEN[0]),
        ValueError,
        r"bias has shape \[8\]; it must be \[20\]",
    ),
    "chunk 0": (lambda: loss(chunk=0), ValueError, "chunk is 0; it must be at least 1"),
    "chunk a float": (lambda: loss(chunk=1.5), ValueError, "chunk is 1.5; it must be an integer"),
    "bias a list": (lambda: loss(bias=[1.0]), TypeError, "bias must be a torch.Tensor, not list"),
    "ignore_index": (
        lambda: loss(ignore_index=1.5),
        ValueError,
        "ignore_index is 1.5; it must be an integer",
    ),
    "reduction": (
        lambda: loss(reduction="none"),
        ValueError,
        "reduction is 'none'; it must be 'mean' or 'sum'",
    ),
    "ff no function": (
        lambda: pyfast.chunked_feed_forward(3, HIDDEN, 2),
        TypeError,
        "ff must be a function or a module",
    ),
    "ff's dim": (
        lambda: pyfast.chunked_feed_forward(abs, HIDDEN, 2, dim=2),
        ValueError,
        "dim is 2 and x has shape",
    ),
    "ff's result": (
        lambda: pyfast.chunked_feed_forward(len, HIDDEN, 2),
        TypeError,
        "ff returned a int",
    ),
    "ff's tokens": (
        lambda: pyfast.chunked_feed_forward(lambda t: t[:1], HIDDEN, 2),
        ValueError,
        r"ff made \[1, 8\] of \[2, 8\]; it must keep the number of tokens",
    ),
}


def loss(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, **options):
    return pyfast.chunked_cross_entropy(hidden, weight, labels, **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
