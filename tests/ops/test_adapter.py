"""The adapter: values and every gradient against float64, what it saves, compile, autocast, checkpointing, module."""

import pytest
import torch
from helpers.tolerance import DTYPES, assert_as_exact_as_torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast import reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual")


def random(*shape, device="cpu", dtype=torch.float32):
    """Multiples of 1/8: the sign of a hidden value, which relu asks for, does not hang on the order of its sum."""
    return (torch.randn(*shape).clamp(-4, 4) * 8).round().div(8).to(device, dtype)


def inputs(
    lead,
    into,
    bottleneck,
    out,
    device="cpu",
    dtype=torch.float32,
    weights=None,
    bias=True,
    residual=False,
):
    place, weights = (
        {"device": device, "dtype": dtype},
        {"device": device, "dtype": weights or dtype},
    )
    x = random(*lead, into, **place)
    down, up = random(bottleneck, into, **weights) / 8, random(out, bottleneck, **weights) / 4
    down_bias, up_bias = (random(n, **weights) if bias else None for n in (bottleneck, out))
    residual = random(*lead, out, **place) if residual else None
    return [
        t if t is None else t.requires_grad_() for t in (x, down, down_bias, up, up_bias, residual)
    ]


def run(function, tensors, dy, **options):
    x, *parameters, residual = tensors
    y = function(x, *parameters, residual=residual, **options)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def check(tensors, **options):
    """Ours, plain torch's and float64's: the output and all gradients."""
    lead, out = tensors[0].shape[:-1], tensors[3].shape[0]
    dy = random(*lead, out, device=tensors[0].device, dtype=tensors[0].dtype)
    ours = run(pyfast.adapter, tensors, dy, **options)
    # Plain torch takes one dtype: parameters in another are cast there, and their gradients cast
    # back.
    same = [
        None if t is None else t.detach().to(tensors[0].dtype).requires_grad_() for t in tensors
    ]
    torchs = run(reference.adapter, same, dy, **options)
    exact = run(
        reference.adapter,
        [None if t is None else t.detach().double().requires_grad_() for t in tensors],
        dy,
        **options,
    )
    assert len(ours) == len(exact)
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert_as_exact_as_torch(a, b.to(a.dtype), c)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [((3, 11), 37, 9), ((130,), 96, 24), ((2,), 64, 16)], ids=str)
def test_values_and_gradients(device, sizes, activation, dtype):
    lead, width, bottleneck = sizes
    check(
        inputs(lead, width, bottleneck, width, device, dtype), activation=activation, scaling=0.75
    )


SIZES = [
    ((), 5, 3, 5),
    ((1,), 1, 1, 1),
    ((4,), 7, 2, 7),
    ((5,), 7, 2, 7),
    ((65,), 64, 33, 64),
    ((300,), 32, 257, 32),
    ((257,), 544, 64, 544),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_sizes(device, sizes, bias, dtype):
    check(inputs(*sizes, device, dtype, bias=bias))
    lead, into, bottleneck, out = sizes
    check(
        inputs(lead, into, bottleneck, out + 32, device, dtype, bias=bias, residual=True),
        scaling=-2.0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_float32(device, dtype):
    ours = check(inputs((70,), 64, 16, 64, device, dtype, weights=torch.float32))
    assert ours[0].dtype == dtype and all(g.dtype == torch.float32 for g in ours[2:])


def test_residual_in_float32(device):
    x, *parameters, residual = inputs((70,), 64, 16, 64, device, torch.bfloat16, residual=True)
    residual = residual.detach().float().requires_grad_()
    y = pyfast.adapter(x, *parameters, residual=residual)
    grads = torch.autograd.grad(y, [x, residual], torch.ones_like(y))
    assert y.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    exact = reference.adapter(*(t.double() for t in (x, *parameters)), residual=residual.double())
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("strided", ["x", "parameters", "dy"])
def test_strides(device, strided):
    tensors = inputs((6, 8), 40, 12, 40, device)
    dy = random(6, 8, 40, device=device)
    plain = run(pyfast.adapter, tensors, dy, activation="silu")
    if strided == "dy":
        dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    for i in {"x": [0], "parameters": [1, 2, 3, 4], "dy": []}[strided]:
        gapped = torch.stack([tensors[i].detach()] * 2, -1)[..., 0]
        assert not gapped.is_contiguous()
        tensors[i] = gapped.requires_grad_()
    assert all(map(torch.equal, plain, run(pyfast.adapter, tensors, dy, activation="silu")))


def test_no_rows(device):
    tensors = inputs((0, 3), 16, 4, 16, device)
    y, dx, *grads = run(pyfast.adapter, tensors, torch.empty(0, 3, 16, device=device))
    assert y.shape == dx.shape == (0, 3, 16)
    assert [g.shape for g in grads] == [t.shape for t in tensors[1:5]] and not any(
        g.any() for g in grads
    )


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite_rows_stay_in_their_rows(device, activation, rows):
    x, *parameters, _ = (
        None if t is None else t.detach() for t in inputs((rows,), 32, 8, 32, device)
    )
    x[1, 3] = float("nan")
    y = pyfast.adapter(x, *parameters, activation=activation)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_hidden_values(device, activation):
    """Where exponentials overflow, and where a series takes over from them."""
    z = torch.cat(
        [
            torch.linspace(-120, 120, 4001),
            torch.linspace(-1, 1, 2001),
            torch.tensor([0.0, 1e-30, 3e4, -3e4]),
        ]
    )
    x = z.to(device)[:, None].requires_grad_()
    one = torch.ones(1, 1, device=device)
    zero = torch.zeros_like(x)
    y = pyfast.adapter(x, one, None, one, None, activation=activation, residual=zero)
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact_x = z.double()[:, None].requires_grad_()
    exact = reference.ACTIVATIONS[activation](exact_x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_x)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.cpu().double(), exact_slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(activation, residual):
    tensors = [
        t if t is None else t.detach().double() + 0.01
        for t in inputs((3,), 5, 4, 5, residual=residual)
    ]
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    given = [t for t in tensors if t is not None]

    def call(*given):
        options = {"residual": given[5]} if residual else {}
        return pyfast.adapter(*given[:5], activation=activation, scaling=0.5, **options)

    assert gradcheck(call, given)


@pytest.mark.parametrize("frozen", range(6), ids=NAMES)
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(device, frozen):
    tensors = inputs((9,), 16, 4, 16, device, residual=True)
    dy = random(9, 16, device=device)
    everything = run(pyfast.adapter, tensors, dy)
    tensors[frozen].requires_grad_(False)
    del everything[1 + frozen]
    assert all(map(torch.equal, run(pyfast.adapter, tensors, dy), everything))
    alone = [t.detach().requires_grad_(i == frozen) for i, t in enumerate(tensors)]
    whole = run(pyfast.adapter, inputs_like(tensors), dy)
    torch.testing.assert_close(run(pyfast.adapter, alone, dy)[1], whole[1 + frozen])


def inputs_like(tensors):
    return [t.detach().requires_grad_() for t in tensors]


def test_saves_x_and_the_parameters_only(device):
    tensors = inputs((50,), 64, 16, 64, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pyfast.adapter(*tensors[:5])
    allowed = {t.data_ptr() for t in tensors[:5]}
    assert {t.data_ptr() for t in saved} <= allowed
    assert sum(t.nbytes for t in saved) <= sum(t.nbytes for t in tensors[:5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_threads(dtype):
    tensors = inputs((301,), 160, 40, 160, dtype=dtype)
    dy, before, found = random(301, 160), torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(pyfast.adapter, tensors, dy, activation="gelu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(device, dynamic):
    layer = pyfast.Adapter(32, 8, activation="gelu", layer_norm_before=True, device=device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for m in (3, 8):
        x = torch.randn(m, 32, device=device, requires_grad=True)
        wanted = [x, *layer.parameters()]
        grads = [torch.autograd.grad(f(x).square().sum(), wanted) for f in (layer, compiled)]
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_products_not_the_residual(device, dtype):
    x, *parameters, _ = inputs((20,), 32, 8, 32, device)
    with torch.autocast(device.type, dtype=dtype):
        y = pyfast.adapter(x, *parameters)
        with torch.autocast(device.type, enabled=False):
            assert torch.equal(
                pyfast.adapter(x, *parameters), pyfast.adapter(x, *parameters, residual=x)
            )
    assert y.dtype == torch.float32  # as x + F.linear(...) would be
    assert torch.equal(y, pyfast.adapter(x.to(dtype), *parameters, residual=x))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *parameters))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device, reentrant):
    layer = pyfast.Adapter(32, 8, activation="silu", device=device)
    x = torch.randn(4, 32, device=device, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x.grad = None
        call(call(x).relu()).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_second_derivative_is_refused(device):
    tensors = inputs((4,), 16, 4, 16, device)
    y = pyfast.adapter(*tensors[:5], activation="tanh").square().sum()
    (dx,) = torch.autograd.grad(y, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- the module ---


def test_module_starts_near_the_identity(device):
    x = torch.randn(10, 256, device=device)
    houlsby, lora = (pyfast.Adapter(256, init=init, device=device) for init in ("houlsby", "lora"))
    assert houlsby.bottleneck == 16 and 0 < (houlsby(x) - x).norm() < 0.05 * x.norm()
    assert torch.equal(lora(x), x)
    assert 0.007 < houlsby.down_weight.std() < 0.01 and houlsby.down_weight.abs().max() <= 0.02


def test_module_is_the_function(device):
    layer = pyfast.Adapter(32, 5, activation="tanh", scaling=0.5, device=device)
    x, residual = random(3, 4, 32, device=device), random(3, 4, 32, device=device)
    parameters = (layer.down_weight, layer.down_bias, layer.up_weight, layer.up_bias)
    options = {"activation": "tanh", "scaling": 0.5}
    assert torch.equal(layer(x), pyfast.adapter(x, *parameters, **options))
    assert torch.equal(
        layer(x, residual), pyfast.adapter(x, *parameters, residual=residual, **options)
    )
    assert repr(layer) == "Adapter(32, 5, activation='tanh', scaling=0.5, bias=True)"


def test_module_norms(device):
    layer = pyfast.Adapter(
        32, 5, layer_norm_before=True, layer_norm_after=True, bias=False, device=device
    )
    x = random(6, 32, device=device) * 3
    inner = pyfast.adapter(
        layer.norm_before(x), layer.down_weight, None, layer.up_weight, None, residual=x
    )
    assert torch.equal(layer(x), layer.norm_after(inner))
    assert set(layer.state_dict()) == {
        *("down_weight", "up_weight"),
        *(f"norm_{where}.{what}" for where in ("before", "after") for what in ("weight", "bias")),
    }


def test_module_trains(device):
    layer = pyfast.Adapter(16, 8, activation="gelu", device=device)
    x, target = torch.randn(64, 16, device=device), torch.randn(64, 16, device=device)
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=1e-2), []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
