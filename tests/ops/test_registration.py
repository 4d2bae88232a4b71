"""What every op promises beside its values: registration, gradients, compile, autocast, checkpointing, DDP, memory."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import gradcheck
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import pyfast
from pyfast import reference
from pyfast._support import registry
from pyfast._support.measure import peak_bytes
from pyfast.formats import nf4_codebooks
from pyfast.ops.registered import lora as registered_lora
from pyfast.ops.registered import nf4 as registered_nf4


def weight(device, out=24, into=70, nested=True):
    return pyfast.nf4_quantize(torch.randn(out, into, device=device), nested=nested)


def op_samples(device):
    """(op, args) for every registered op."""
    tables = [
        t.to(device)
        for t in (
            nf4_codebooks.THRESHOLDS["nf4"],
            nf4_codebooks.ORDER["nf4"],
            nf4_codebooks.NESTED_THRESHOLDS,
        )
    ]
    for nested in (False, True):
        yield "nf4_quantize", (torch.randn(7, 33, device=device), *tables, 64, nested)
        w = weight(device, nested=nested)
        yield "nf4_dequantize", (w.state, w.shape, 64, torch.bfloat16)
        x = torch.randn(2, 5, 70, device=device)
        yield "nf4_linear", (x, w.state, None, w.shape, 64)
        yield "nf4_linear", (x[:, ::2], w.state, torch.randn(24, device=device), w.shape, 64)
        yield "nf4_linear_backward", (torch.randn(5, 24, device=device), w.state, w.shape, 64)
        yield from lora_samples(device, w.state, w.shape, 64)
    yield from lora_samples(device, [torch.randn(24, 70, device=device)], (24, 70), 0)
    yield from adapter_samples(device)
    yield from lsh_samples(device)
    rows, vocabulary = torch.randn(2, 5, 12, device=device), torch.randn(30, 12, device=device)
    labels = torch.tensor([[3, -100, 29, 0, 7], [1, 2, 3, 4, 5]], device=device)
    for bias, needs in (
        (None, [True, True, False]),
        (vocabulary[:, 0].contiguous(), [True, False, True]),
    ):
        yield "chunked_cross_entropy", (rows, vocabulary, labels, bias, 4, -100, needs)
    yield from reversible_samples(device)


def lora_samples(device, base, shape, blocksize):
    x, dy, s = (torch.randn(2, 5, width, device=device) for width in (70, 24, 4))
    a, b = torch.randn(3, 4, 70, device=device), torch.randn(3, 24, 4, device=device)
    vector, seeds = torch.rand(24, device=device), torch.tensor([3, 4], device=device)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7], dtype=torch.int32, device=device)
    route = [
        order,
        torch.tensor([2, 5, 5, 10], dtype=torch.int32, device=device),
        torch.ones(3, device=device),
    ]
    where = (shape, blocksize)
    yield "lora_shrink", (x, [a[:1], a[1:2, :2]], [1.0, 2.0], 0.5, seeds, [])
    yield "lora_shrink", (x, [a], [1.0], 0.0, None, route)
    yield "lora_linear", (x, s, base, b[:1], None, None, *where, [])
    yield "lora_linear", (x, s, base, b, vector, vector, *where, route)
    yield "lora_expand_backward", (dy, s, b[:1], None, None, 2.0, [], [True, True, False, False])
    yield "lora_expand_backward", (dy, s, b, vector, dy + 1, 2.0, route, [True] * 4)
    yield "lora_linear_backward", (dy, s, base, a[:1], None, None, *where, 0.5, seeds[0], [])
    yield "lora_linear_backward", (dy, s, base, a, vector, x + 1, *where, 0.0, None, route)
    yield "lora_shrink_backward", (s, x, [1, 3], 1, 0.5, seeds, [], torch.bfloat16)
    yield "lora_shrink_backward", (s, x, [4], 3, 0.0, None, route, torch.float32)
    yield "lora_row_squares", (base, *where)


def adapter_samples(device):
    x, down, up = (torch.randn(*shape, device=device) for shape in ((2, 5, 70), (16, 70), (70, 16)))
    bias, up_bias = torch.randn(16, device=device), torch.randn(70, device=device)
    yield "adapter", (x, down, None, up, None, None, "relu", 1.0)
    yield "adapter", (x[:, ::2].bfloat16(), down, bias, up, up_bias, x[:, ::2], "gelu", 0.5)
    for needs in ([True] * 5, [True, False, True, False, False], [False, False, False, True, True]):
        yield "adapter_backward", (x, x, down, bias, up, True, "silu", 0.5, needs)


def lsh_samples(device):
    seed = torch.tensor(3, device=device)
    q, v = torch.randn(2, 4, 50, 12, device=device), torch.randn(2, 2, 50, 6, device=device)
    yield "lsh_rotations", (seed, (4, 12, 3, 5))
    rotations = torch.ops.pyfast.lsh_rotations(seed, (1, 4, 12, 3, 5))
    yield "lsh_hash", (q, rotations, [4, 6])
    buckets = torch.ops.pyfast.lsh_hash(
        torch.stack([q, q.flip(2)]).flatten(0, 1), rotations, [4, 6]
    )
    buckets = buckets.view(2, 2, 4, 3, 50)
    yield "lsh_sort", (buckets, 24)
    order, ranks = torch.ops.pyfast.lsh_sort(buckets, 24)
    mask = torch.rand(2, 50, device=device) < 0.8
    plain = (16, 1.0, "rms", "rounds", True, False, False)
    other = (16, 0.3, "l2", "round", False, True, True)
    shared = (order[:1].contiguous(), None, None, None, None, 0.0, *plain)
    given = (order, buckets, ranks, mask, seed, 0.2, *other)
    for k, rest in ((None, shared), (q[:, :2], given)):
        yield "lsh_attention", (q, k, v, *rest)
        out, lse = torch.ops.pyfast.lsh_attention(q, k, v, *rest)
        for needs in ([True] * 3, [True, False, False], [False, False, True]):
            yield "lsh_attention_backward", (out + 1, None, q, k, v, out, lse, *rest, needs)
        yield "lsh_attention_backward", (out + 1, lse + 1, q, k, v, out, lse, *rest, [True] * 3)


def reversible_samples(device):
    x, flag = torch.randn(3, 50, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    for stream, bits in ((x.bfloat16(), -1), (x.double(), -1), (x, 16), (x.int(), 20)):
        yield "reversible_step", (stream.clone(), x, False, bits, flag.clone())
        out = x.t().contiguous().t().bfloat16()
        yield "reversible_step", (stream.clone(), out, True, bits, flag.clone())


def test_every_op_is_sampled(device):
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyfast::")
    }
    assert registered == {op for op, _ in op_samples(device)}


def test_opcheck(device):
    for op, args in op_samples(device):
        torch.library.opcheck(getattr(torch.ops.pyfast, op).default, args)


def test_a_fallback_gives_what_the_fake_promises():
    plain = torch._C.DispatchKey.CompositeExplicitAutograd
    for op, args in op_samples("cpu"):
        overload = getattr(torch.ops.pyfast, op).default
        result = overload._op_dk(plain, *args)
        promised = overload(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args))
        for tensor, fake in zip(tree_leaves(result), tree_leaves(promised), strict=True):
            if tensor is not None:
                assert (tensor.shape, tensor.dtype) == (fake.shape, fake.dtype), op
                assert tensor.stride() == fake.stride(), op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_checks_come_before_fake_kernel_and_reference(dtype):
    w = weight("cpu")
    bad = torch.randn(3, 69, dtype=dtype), w.state, None, w.shape, 64
    on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), bad)
    op, plain = torch.ops.pyfast.nf4_linear.default, torch._C.DispatchKey
    for run in (
        lambda: op(*on_meta),
        lambda: op._op_dk(plain.CompositeExplicitAutograd, *bad),
        lambda: registry.run_kernel("nf4_linear", *bad),
        lambda: registered_nf4.linear(*bad),
    ):
        with pytest.raises(ValueError, match="last dimension .* 70"):
            run()


def test_an_empty_list_of_tensors_is_refused():
    with pytest.raises(ValueError, match="no argument is a tensor"):
        registered_lora.row_squares([], (3, 4), 0)


def test_float64_runs_the_reference_and_no_kernel():
    w = weight("cpu")
    args = torch.randn(3, 70, dtype=torch.float64), w.state, None, w.shape, 64
    expected = reference.nf4_linear_op(*args)
    assert torch.equal(registry.run_kernel("nf4_linear", *args), expected)
    assert torch.equal(registered_nf4.linear(*args), expected)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_fallback_s_results_are_laid_out_as_the_kernel_s(by_tokens):
    """As the fakes say, whatever the arguments' strides: compiled code rests on it."""
    shape = (2, 40, 4, 6) if by_tokens else (2, 4, 40, 6)
    q, k, v = (
        torch.randn(shape).transpose(1, 2) if by_tokens else torch.randn(shape) for _ in range(3)
    )
    order, ranks = torch.ops.pyfast.lsh_sort(
        torch.randint(4, (2, 2, 4, 3, 40), dtype=torch.int32), 4
    )
    rest = (order, None, ranks, None, None, 0.0, 16, 1.0, "rms", "rounds", True, False, False)
    forward, backward = (
        torch.ops.pyfast.lsh_attention.default,
        torch.ops.pyfast.lsh_attention_backward.default,
    )
    plain = torch._C.DispatchKey.CompositeExplicitAutograd
    kernel, fallback = forward(q, k, v, *rest), forward._op_dk(plain, q, k, v, *rest)
    args = (kernel[0], None, q, k, v, *kernel, *rest, [True] * 3)
    kernel, fallback = (*kernel, *backward(*args)), (*fallback, *backward._op_dk(plain, *args))
    assert [t.stride() for t in kernel] == [t.stride() for t in fallback]
    assert all(t.transpose(1, 2).is_contiguous() == by_tokens for t in (*kernel[2:], kernel[0]))


@pytest.mark.parametrize("nested", [False, True])
def test_gradcheck(nested):
    w = weight("cpu", 6, 11, nested)
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, b: pyfast.nf4_linear(x, w, b), (x, b))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(device, dynamic):
    layer = pyfast.NF4Linear.from_linear(nn.Linear(70, 24, device=device))
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for m in (3, 8):
        x = torch.randn(m, 70, device=device, requires_grad=True)
        y, z = layer(x), compiled(x)
        torch.testing.assert_close(z, y)
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(z, [x, layer.bias], dy), torch.autograd.grad(y, [x, layer.bias], dy)
        )


def test_compiles_with_a_weight_as_argument(device):
    w = weight(device)
    x = torch.randn(4, 70, device=device)
    compiled = torch.compile(lambda x: pyfast.nf4_linear(torch.relu(x), w) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), pyfast.nf4_linear(torch.relu(x), w) * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    layer = pyfast.NF4Linear.from_linear(nn.Linear(70, 24, device=device))
    x = torch.randn(4, 70, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
        with torch.autocast(device.type, enabled=False):
            assert layer(x).dtype == torch.float32
    assert y.dtype == dtype
    assert torch.equal(y, pyfast.nf4_linear(x.to(dtype), layer.nf4_weight, layer.bias.to(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.bias.grad.dtype == torch.float32


def test_autocast_casts_the_bias_once(device):
    layer = pyfast.NF4Linear.from_linear(nn.Linear(70, 24, device=device))
    layer.bias.data.fill_(1e5)  # beyond float16
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer(torch.zeros(2, 70, device=device, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device, reentrant):
    layer = pyfast.NF4Linear.from_linear(nn.Linear(70, 70, device=device))
    x = torch.randn(4, 70, device=device, requires_grad=True)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x.grad = None
        run(run(x).relu()).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_saves_only_the_packed_weight(device):
    w = weight(device)
    x = torch.randn(4, 70, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pyfast.nf4_linear(x, w, torch.randn(24, device=device))
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in w.state}


def test_bias_of_no_rows_and_no_features(device):
    w = pyfast.nf4_quantize(torch.empty(0, 64, device=device))
    b = torch.empty(0, device=device, requires_grad=True)
    pyfast.nf4_linear(torch.randn(3, 64, device=device), w, b).sum().backward()
    assert b.grad.shape == (0,)


def test_second_derivative_is_refused(device):
    x = torch.randn(4, 70, device=device, requires_grad=True)
    y = pyfast.nf4_linear(x, weight(device)).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- data parallel ---


def small_model():
    torch.manual_seed(0)
    quantized = pyfast.NF4Linear.from_linear(nn.Linear(16, 16))
    return nn.Sequential(nn.Linear(16, 16), quantized, nn.ReLU(), nn.Linear(16, 4))


def ddp_rank(rank: int, init: str, results):
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    model = small_model()
    if rank == 1:  # DDP must hand rank 0's weight over whole, scales and all
        model[1] = pyfast.NF4Linear.from_linear(nn.Linear(16, 16))
    model = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))[rank * 4 : rank * 4 + 4]
    model(x).square().mean().backward()
    results[rank] = [p.grad for p in model.parameters() if p.requires_grad]
    dist.destroy_process_group()


def test_ddp_gradients_are_one_process_s(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(ddp_rank, (str(tmp_path / "init"), results), nprocs=2)
        ranks = [results[0], results[1]]
    model = small_model()
    model(torch.randn(8, 16, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    for parameter, a, b in zip((p for p in model.parameters() if p.requires_grad), *ranks):
        torch.testing.assert_close(a, parameter.grad)
        assert torch.equal(a, b)


# --- memory ---


def test_the_allocation_counter_counts():
    assert 0 <= peak_bytes(lambda: torch.empty(1 << 20) + 1) - (8 << 20) < 64


def test_peak_memory_is_activations_and_a_panel(device):
    gpu = device.type == "cuda"
    out, n, m = 24576 if gpu else 8192, 8192, 256
    w = pyfast.nf4_quantize(torch.randn(out, n, device=device))
    x = torch.randn(m, n, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, out, device=device, dtype=torch.bfloat16)

    def step():
        pyfast.nf4_linear(x, w).backward(dy)

    if gpu:
        step()
        x.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_bytes(step)
    activations, panel = (
        x.nbytes + dy.nbytes,
        (128 if gpu else 16) << 20,
    )  # dx and y; x and w were there before
    assert peak <= activations + panel < w.numel() * 2, f"{peak >> 20} MB"
