"""The command `selftest`: every op beside its reference, on the user's own device."""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import reference
from pyfast.cli.errors import default_device
from pyfast.ops import nf4
from pyfast.ops.adapter import adapter
from pyfast.ops.lora import lora_linear
from pyfast.ops.lsh_attention import lsh_attention
from pyfast.ops.lsh_hash import lsh_buckets
from pyfast.reference import lsh_options

SUMMARY = "check every op against its reference on this machine"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The gradient of lora_b at 3 rows depends on 48 sums alone (3 rows, rank 16). Torch's order can
# round them almost exactly by chance, and nobody else adds in that order. In float32, 5 to 9 of 40
# seeds needed up to 1.8 epsilons, with every instruction set; no other case needed more than half
# of one. The tests allow 2^-21, too.
_FEW_SUMS_SLACK = 2.0**-21


class Case(NamedTuple):
    """One comparison; errors are relative to the exact result's norm."""

    op: str
    name: str
    error: float
    allowed: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `selftest` to its parser."""
    parser.add_argument(
        "--device",
        default=default_device(),
        help="device to test, for example cpu or cuda (default here: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each case; return 0 if all pass, else 1."""
    device = arguments.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch {torch.__version__} sees no CUDA device here")
    print(f"{'op':22} {'case':34} {'error':>9} {'allowed':>9}")
    passed = failed = 0
    for case in run_cases(torch.device(device)):
        is_right = case.error <= case.allowed  # False for NaN
        passed, failed = passed + is_right, failed + (not is_right)
        mark = "" if is_right else "  WRONG"
        print(f"{case.op:22} {case.name:34} {case.error:9.1e} {case.allowed:9.1e}{mark}")
    print(f"\n{passed} passed, {failed} failed on {device}")
    return int(failed > 0)


def run_cases(device: torch.device) -> Iterator[Case]:
    """Compare every op with its reference, on other random numbers every time."""
    generator = torch.Generator()
    generator.seed()
    yield from _compare_nf4((200, 320), True, "nf4", device, generator)
    yield from _compare_nf4((67, 131), False, "fp4", device, generator)
    yield from _compare_lora(device, generator)
    yield from _compare_adapter(device, generator)
    yield from _compare_lsh(device, generator)
    yield from _compare_reversible(device, generator)


# --- NF4 ---


def _compare_nf4(
    shape: tuple[int, int],
    nested: bool,
    quant_type: str,
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[Case]:
    """Compare quantizing and dequantizing bit by bit, and products by their error."""
    weight = torch.randn(shape, generator=generator).to(device)
    options = {"nested": nested, "quant_type": quant_type}
    name = f"{list(shape)} {quant_type}{' nested' if nested else ''}"
    # The reference runs on the same device, because the mean of the scales depends on the order of
    # its sum.
    quantized = nf4.nf4_quantize(weight, **options)
    exact = reference.nf4_quantize(weight, **options)
    error = max(_distance(a, b) for a, b in zip(quantized.state, exact.state))
    yield Case("nf4_quantize", name, error, 0.0)
    for dtype in DTYPES:
        values = nf4.nf4_dequantize(quantized, dtype)
        error = _distance(values, reference.nf4_dequantize(exact, dtype))
        yield Case("nf4_dequantize", f"{name} {_name(dtype)}", error, 0.0)
    values = reference.nf4_values([tensor.cpu() for tensor in exact.state], shape, 64)
    for rows in (1, 9, 70, 600):
        for dtype in DTYPES:
            x = torch.randn(rows, shape[1], generator=generator).to(device, dtype)
            yield from _compare_products(x, quantized, values, f"{name} {_name(dtype)} {rows} rows")


def _compare_products(
    x: Tensor, weight: nf4.NF4Weight, values: Tensor, name: str
) -> Iterator[Case]:
    """Compare nf4_linear and its backward with products of the dequantized values."""
    x.requires_grad_()
    y = nf4.nf4_linear(x, weight)
    dy = torch.randn(y.shape).to(x)
    dx = torch.autograd.grad(y, x, dy)[0]
    exact, dense = values.double(), values.to(x).float()
    slack = _slack(x.dtype, x.device) / 4
    for op, result, plain, true in (
        ("nf4_linear", y, F.linear(x.float(), dense), x.cpu().double() @ exact.t()),
        ("nf4_linear_backward", dx, dy.float() @ dense, dy.cpu().double() @ exact),
    ):
        # Twice the error that torch has when it accumulates in float32 and rounds once.
        allowed = 2 * _distance(plain.to(x), true) + slack
        yield Case(op, name, _distance(result, true), allowed)


# --- LoRA and adapters ---


def _compare_lora(device: torch.device, generator: torch.Generator) -> Iterator[Case]:
    """Compare the output and every gradient, with DoRA and dropout."""
    for base, rows in (("dense", 3), ("dense", 70), ("nf4", 3), ("nf4", 70), ("nf4", 600)):
        for dtype in DTYPES:
            tensors = {
                "x": torch.randn(rows, 320, generator=generator) / 4,
                "lora_a": torch.randn(16, 320, generator=generator) / 4,
                "lora_b": torch.randn(200, 16, generator=generator) / 4,
                "bias": torch.randn(200, generator=generator) / 4 + 1,
                "magnitude": torch.randn(200, generator=generator) / 4 + 1,
            }
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            weight = torch.randn(200, 320, generator=generator).to(dtype)
            if base == "nf4":
                weight = nf4.nf4_quantize(weight)
            result = _run_lora(lora_linear, tensors, weight, device, dtype)
            cpu = torch.device("cpu")
            exact = _run_lora(reference.lora_linear, tensors, weight, cpu, torch.float64)
            plain = _run_lora(reference.lora_linear, tensors, weight, cpu, dtype)
            for name in result:
                slack = _slack(dtype, device) / 2
                if rows <= 3 and name == "d lora_b":
                    slack = max(slack, _FEW_SUMS_SLACK)
                allowed = 2 * _distance(plain[name], exact[name]) + slack
                error = _distance(result[name], exact[name])
                case = f"{base} {_name(dtype)} {rows} rows: {name}"
                yield Case("lora_linear", case, error, allowed)


def _run_lora(
    function: Callable,
    tensors: dict[str, Tensor],
    weight: Tensor | nf4.NF4Weight,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the output `y` and the gradient of each tensor."""
    inputs = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}
    weight = weight.to(device, dtype) if isinstance(weight, Tensor) else weight.to(device)
    y = function(weight=weight, **inputs, scaling=2.0, dropout_p=0.1, seed=7)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y} | {f"d {name}": gradient for name, gradient in zip(inputs, gradients)}


def _compare_adapter(device: torch.device, generator: torch.Generator) -> Iterator[Case]:
    """Compare adapters of 96 values and a bottleneck of 24.

    Their inputs are multiples of 1/8, so that the signs of the sums do not depend on the order.
    """
    for activation in reference.ACTIVATIONS:
        for rows, dtype in ((1, torch.float32), *((70, dtype) for dtype in DTYPES)):
            tensors = []
            for shape in ((rows, 96), (24, 96), (24,), (96, 24), (96,), (rows, 96)):
                values = torch.randn(shape, generator=generator).clamp(-4, 4)
                tensors.append((values * 8).round().to(dtype) / 8)
            *inputs, dy = tensors
            result = _run_adapter(adapter, [t.to(device) for t in inputs], dy, activation)
            plain = _run_adapter(reference.adapter, [t.float() for t in inputs], dy, activation)
            exact = _run_adapter(reference.adapter, [t.double() for t in inputs], dy, activation)
            case = f"{activation} {_name(dtype)} {rows} rows"
            for i, (tensor, plain_tensor, true) in enumerate(zip(result, plain, exact)):
                # Hidden values are rounded, too, where tensor units ask for it; an activation errs
                # by a few units in the last place.
                rounding = 4 * torch.finfo(dtype).eps
                allowed = 2 * _distance(plain_tensor.to(dtype), true) + rounding
                op = "adapter_backward" if i else "adapter"
                yield Case(op, case, _distance(tensor, true), allowed)


def _run_adapter(
    function: Callable, inputs: list[Tensor], dy: Tensor, activation: str
) -> list[Tensor]:
    """Return the output and the gradient of each input."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    y = function(*inputs, activation=activation, scaling=0.01)
    return [y, *torch.autograd.grad(y, inputs, dy.to(y))]


# --- LSH attention and reversible steps ---


def _compare_lsh(device: torch.device, generator: torch.Generator) -> Iterator[Case]:
    """Compare bucket ids, then attention and its gradients by the same ids.

    A few ids may differ, where two buckets are almost equally near.
    """
    cpu = torch.device("cpu")
    for preset in lsh_options.PRESETS:
        for tokens, dtype in ((1, torch.float32), *((300, dtype) for dtype in DTYPES)):
            shape = (2, 2, tokens, 40)
            inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
            qk, case = inputs[0], f"{preset} {_name(dtype)} {tokens} tokens"
            ids = lsh_buckets(qk.to(device), n_buckets=(8, 4), seed=7)
            exact_ids = reference.lsh_buckets(qk.double(), n_buckets=(8, 4), seed=7)
            share = (ids.cpu() != exact_ids).double().mean().item()
            yield Case("lsh_hash", case, share, 0.002)
            shared = (inputs, exact_ids, preset)
            result = _run_lsh(lsh_attention, *shared, device, dtype)
            plain = _run_lsh(reference.lsh_attention, *shared, cpu, dtype)
            exact = _run_lsh(reference.lsh_attention, *shared, cpu, torch.float64)
            names = ("lsh_attention", "lsh_attention_backward", "lsh_attention_backward")
            for op, tensor, plain_tensor, true in zip(names, result, plain, exact):
                allowed = 2 * _distance(plain_tensor, true) + torch.finfo(dtype).eps
                yield Case(op, case, _distance(tensor, true), allowed)


def _run_lsh(
    function: Callable,
    inputs: list[Tensor],
    ids: Tensor,
    preset: str,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the output and the gradients of qk and v."""
    qk, v, dy = (tensor.to(device, dtype) for tensor in inputs)
    inputs = [qk.requires_grad_(), v.requires_grad_()]
    y = function(
        *inputs,
        preset=preset,
        n_buckets=(8, 4),
        buckets=ids.to(device),
        chunk_length=32,
        dropout_p=0.1,
        seed=5,
    )
    return [y, *torch.autograd.grad(y, inputs, dy)]


def _compare_reversible(device: torch.device, generator: torch.Generator) -> Iterator[Case]:
    """Compare steps of reversible streams bit by bit."""
    streams = [(torch.float32, 16), (torch.int32, 16), (torch.float32, -1), (torch.bfloat16, -1)]
    for stream_dtype, bits in streams:
        for dtype in DTYPES:
            stream, out = (torch.randn(5, 333, generator=generator) for _ in range(2))
            stream = stream.mul(65536).round()  # steps of 2^-16, which the streams can hold
            if stream_dtype != torch.int32:
                stream = stream / 65536
            results = []
            for step, run_device in (
                (torch.ops.pyfast.reversible_step, device),
                (reference.reversible_step_op, torch.device("cpu")),
            ):
                flag = torch.zeros(1, dtype=torch.int32, device=run_device)
                result = stream.to(run_device, stream_dtype, copy=True)
                step(result, out.to(run_device, dtype), True, bits, flag)
                results.append(result)
            case = f"{_name(stream_dtype)} {bits} bits, {_name(dtype)}"
            yield Case("reversible_step", case, _distance(*results), 0.0)


# --- errors ---


def _distance(value: Tensor, exact: Tensor) -> float:
    """Return ||value - exact|| / ||exact||."""
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    return ((value - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def _slack(dtype: torch.dtype, device: torch.device) -> float:
    """Return the dtype's epsilon, or four times that in float32 on a GPU.

    Cases allow a share of it on top of twice torch's error. A GPU adds in another order than the
    plain torch of a CPU, which only float32 shows.
    """
    factor = 4 if dtype == torch.float32 and device.type == "cuda" else 1
    return torch.finfo(dtype).eps * factor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
