"""What LoRA's ops promise beside their values: gradients, compile, autocast, checkpointing, DDP, what is saved."""

import pytest
import torch
import torch.distributed as dist
from helpers.tolerance import assert_as_exact_as_torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast import reference
from pyfast._support.measure import peak_bytes
from pyfast.ops.lora import lora_linear, lora_linears, multi_lora_linear
from pyfast.ops.lora_arguments import Projection


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Dynamo counts compilations of a function over all tests."""
    torch._dynamo.reset()


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def single(device, out=24, into=70, r=4, dtype=torch.float32):
    """x, lora_a, lora_b that want gradients."""
    return [
        torch.randn(*shape, device=device).to(dtype).requires_grad_()
        for shape in ((5, into), (r, into), (out, r))
    ]


# --- gradcheck, in float64, with every option ---


@pytest.mark.parametrize("nf4", [False, True])
def test_gradcheck(nf4):
    weight = pyfast.nf4_quantize(torch.randn(6, 11)) if nf4 else double(6, 11)
    leaves = [double(2, 3, 11), double(4, 11), double(6, 4), double(6), double(6)] + (
        [] if nf4 else [weight]
    )

    def function(x, a, b, bias, lora_bias, w=weight):
        return lora_linear(
            x, w, a, b, scaling=0.7, bias=bias, lora_bias=lora_bias, dropout_p=0.3, seed=5
        )

    assert gradcheck(function, leaves)


def test_gradcheck_of_dora():
    """Of what the norm, a constant to autograd, does not depend on; the rest is the reference's autograd's."""
    x, a, b, bias, lora_bias, magnitude = (
        double(5, 11),
        double(4, 11),
        double(6, 4),
        double(6),
        double(6),
        double(6),
    )
    weight = torch.randn(6, 11, dtype=torch.float64)

    def function(op, *leaves):
        names = ("bias", "lora_bias", "magnitude")
        return op(
            leaves[0],
            weight,
            a,
            b,
            scaling=0.7,
            dropout_p=0.3,
            seed=5,
            **dict(zip(names, leaves[1:])),
        )

    assert gradcheck(
        lambda *leaves: function(lora_linear, *leaves), [x, bias, lora_bias, magnitude]
    )
    leaves = [x, a, b, bias, lora_bias, magnitude]
    dy = torch.randn(5, 6, dtype=torch.float64)
    ours, exact = (
        torch.autograd.grad(function(op, x, bias, lora_bias, magnitude), leaves, dy)
        for op in (lora_linear, reference.lora_linear)
    )
    torch.testing.assert_close(ours, exact)


def test_gradcheck_of_projections_that_share_x():
    x, weights = (
        double(5, 11),
        [torch.randn(6, 11, dtype=torch.float64), pyfast.nf4_quantize(torch.randn(3, 11))],
    )
    factors = [double(4, 11), double(6, 4), double(2, 11), double(3, 2)]

    def function(x, *f):
        projections = [
            Projection(weights[0], f[0], f[1], 0.7),
            Projection(weights[1], f[2], f[3], 1.3),
        ]
        return lora_linears(x, projections, dropout_p=0.3, seeds=[5, 6])

    assert gradcheck(function, [x, *factors])


def test_gradcheck_of_several_adapters():
    ids, weight = torch.tensor([[0, 2, -1], [1, 2, 0]]), double(6, 11)
    leaves = [double(2, 3, 11), weight, double(3, 4, 11), double(3, 6, 4), double(6)]
    options = {"adapter_ids": ids, "scaling": [0.5, 1.0, 2.0]}
    assert gradcheck(lambda *t: multi_lora_linear(*t[:4], bias=t[4], **options), leaves)


def test_second_derivative_is_refused(device):
    x, a, b = single(device)
    y = lora_linear(x, torch.randn(24, 70, device=device), a, b, scaling=1.0).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- only what is needed ---


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_inputs_get_nothing(device, wanted):
    leaves = single(device)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    y = lora_linear(leaves[0], torch.randn(24, 70, device=device), *leaves[1:], scaling=1.0)
    y.sum().backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(wanted)


def saved_by(function):
    """The storages a forward keeps, as address -> bytes."""
    saved = {}

    def hook(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        result = function()
    return result, saved


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dora", [False, True])
def test_saves_x_and_s_only(device, nf4, dropout, dora):
    """Beside the parameters; with dropout 8 bytes of seed, with DoRA z, and a norm a row."""
    x, a, b = single(device)
    weight = torch.randn(24, 70, device=device)
    weight = pyfast.nf4_quantize(weight) if nf4 else weight
    magnitude = torch.rand(24, device=device, requires_grad=True) if dora else None
    options = {"scaling": 2.0, "dropout_p": dropout, "magnitude": magnitude}
    _, saved = saved_by(lambda: lora_linear(x, weight, a, b, **options))
    base = weight.state if nf4 else [weight]
    known = [x, a, b, *base, *([magnitude] if dora else [])]
    for tensor in known:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    s, seed, z, norm = 5 * 4 * 4, 8, 5 * 24 * 4, 24 * 4
    assert sum(saved.values()) == s + (seed if dropout else 0) + (z + norm if dora else 0)


def test_saves_nothing_it_will_not_use(device):
    x, a, b = single(device)
    weight = torch.randn(24, 70, device=device)
    a.requires_grad_(False), b.requires_grad_(False)
    _, saved = saved_by(lambda: lora_linear(x, weight, a, b, scaling=1.0))
    assert x.untyped_storage().data_ptr() not in saved and not saved.keys() - {
        t.data_ptr() for t in (weight, a, b)
    }


def test_peak_memory_is_activations_and_a_panel():
    n, m, r = 4096, 256, 16
    weight = pyfast.nf4_quantize(torch.randn(n, n))
    x, a, b = (
        torch.randn(*shape).bfloat16().requires_grad_() for shape in ((m, n), (r, n), (n, r))
    )
    dy = torch.randn(m, n).bfloat16()
    peak = peak_bytes(
        lambda: lora_linear(x, weight, a, b, scaling=1.0, dropout_p=0.1, seed=1).backward(dy)
    )
    activations, panel = 2 * x.nbytes + 2 * (a.nbytes + b.nbytes), 16 << 20
    assert peak <= activations + panel < n * n * 2, f"{peak >> 20} MB"


# --- compile, autocast, checkpointing ---


class Layer(nn.Module):
    def __init__(self, device, nf4=False, dropout=0.0, dora=False, dtype=torch.float32):
        super().__init__()
        weight = torch.randn(70, 70, device=device).to(dtype)
        self.nf4 = pyfast.NF4Linear.from_weight(pyfast.nf4_quantize(weight)) if nf4 else None
        self.weight = None if nf4 else nn.Parameter(weight, requires_grad=False)
        self.a, self.b, self.bias = (
            nn.Parameter(torch.randn(*s, device=device)) for s in ((4, 70), (70, 4), (70,))
        )
        self.magnitude = nn.Parameter(torch.rand(70, device=device) + 1) if dora else None
        self.dropout = dropout

    def forward(self, x):
        weight = self.nf4.nf4_weight if self.nf4 else self.weight
        return lora_linear(
            x,
            weight,
            self.a,
            self.b,
            scaling=0.5,
            bias=self.bias,
            dropout_p=self.dropout,
            magnitude=self.magnitude,
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_compiles_whole(device, nf4, dora, dynamic):
    layer = Layer(device, nf4, dora=dora)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    for m in (3, 12):
        x = torch.randn(m, 70, device=device, requires_grad=True)
        y, z = layer(x), compiled(x)
        torch.testing.assert_close(z, y)
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(z, [x, *parameters], dy),
            torch.autograd.grad(y, [x, *parameters], dy),
        )


def test_compiled_dropout_is_another_each_time(device):
    layer = torch.compile(Layer(device, dropout=0.5), fullgraph=True)
    x = torch.randn(8, 70, device=device, requires_grad=True)
    y, again = layer(x), layer(x)
    assert not torch.equal(y, again)


def test_several_adapters_compile_whole(device):
    a, b = (
        torch.randn(3, 4, 70, device=device, requires_grad=True),
        torch.randn(3, 24, 4, device=device),
    )
    weight, x = torch.randn(24, 70, device=device), torch.randn(6, 70, device=device)
    ids = torch.tensor([0, 2, -1, 1, 1, 0], device=device)
    function = lambda x: multi_lora_linear(x, weight, a, b, adapter_ids=ids, scaling=2.0)  # noqa: E731
    y, z = function(x), torch.compile(function, fullgraph=True)(x)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), a), torch.autograd.grad(y.sum(), a))


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, nf4, dtype):
    layer = Layer(device, nf4, dora=True)
    x = torch.randn(9, 70, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    weight = reference.nf4_values(layer.nf4.nf4_weight.state, (70, 70), 64) if nf4 else layer.weight
    names = {"lora_a": layer.a, "lora_b": layer.b, "bias": layer.bias, "magnitude": layer.magnitude}

    def run(to):
        own = {n: t.to(to) for n, t in names.items()}
        return reference.lora_linear(x.to(to), weight.to(to), **own, scaling=0.5)

    assert_as_exact_as_torch(y, run(dtype), run(torch.float64))
    dy = torch.randn_like(y)
    leaves = [x, *names.values()]
    ours, plain, exact = (
        torch.autograd.grad(out, leaves, dy.to(out.dtype))
        for out in (y, run(dtype), run(torch.float64))
    )
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
    for value, torchs, true in zip(ours, plain, exact):
        assert_as_exact_as_torch(value, torchs, true)
    y.float().sum().backward()
    assert all(
        t.grad.dtype == torch.float32 for t in (x, layer.a, layer.b, layer.bias, layer.magnitude)
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
def test_activation_checkpointing(device, reentrant, nf4):
    """With dropout: the masks of the forward are made again."""
    layer = Layer(device, nf4, dropout=0.3, dora=True)
    x = torch.randn(4, 70, device=device, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        y = run(run(x).relu()).square().sum()
        found.append(torch.autograd.grad(y, x) if not reentrant else None)
        if reentrant:
            x.grad = None
            y.backward()
            found[-1] = (x.grad,)
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- data parallel ---


def ddp_rank(rank: int, init: str, results):
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(Layer("cpu", nf4=True), nn.ReLU(), Layer("cpu"))
    )
    x = torch.randn(8, 70, generator=torch.Generator().manual_seed(1))[rank * 4 : rank * 4 + 4]
    model(x).square().mean().backward()
    results[rank] = [p.grad for p in model.parameters() if p.requires_grad]
    dist.destroy_process_group()


def test_ddp_gradients_are_one_process_s(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(ddp_rank, (str(tmp_path / "init"), results), nprocs=2)
        ranks = [results[0], results[1]]
    torch.manual_seed(0)
    model = nn.Sequential(Layer("cpu", nf4=True), nn.ReLU(), Layer("cpu"))
    model(torch.randn(8, 70, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    for parameter, a, b in zip((p for p in model.parameters() if p.requires_grad), *ranks):
        torch.testing.assert_close(a, parameter.grad)
        assert torch.equal(a, b)
