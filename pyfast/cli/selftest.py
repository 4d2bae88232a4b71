"""Every op against its reference, on the user's own device."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import reference
from pyfast.ops import lora, lsh_hash, nf4
from pyfast.ops.adapter import adapter
from pyfast.ops.lsh_attention import lsh_attention
from pyfast.reference import lsh_options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(device: str) -> int:
    """Prints a line a case; 0 if all hold."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch {torch.__version__} sees no CUDA device here")
    print(f"{'op':22} {'case':34} {'error':>9} {'allowed':>9}")
    failed = total = 0
    for op, case, error, allowed in cases(torch.device(device)):
        holds = error <= allowed  # NaN does not
        total, failed = total + 1, failed + (not holds)
        print(f"{op:22} {case:34} {error:9.1e} {allowed:9.1e}{'' if holds else '  WRONG'}")
    print(f"\n{total - failed} passed, {failed} failed on {device}")
    return int(failed > 0)


def cases(device: torch.device) -> Iterator[tuple[str, str, float, float]]:
    """(op, case, error, allowed error)."""
    generator = torch.Generator()
    generator.seed()  # other numbers every time
    for shape, nested, quant_type in (((200, 320), True, "nf4"), ((67, 131), False, "fp4")):
        weight = torch.randn(shape, generator=generator)
        options = {"nested": nested, "quant_type": quant_type}
        # The reference on the same device, since the mean of the scales depends on the order of its
        # sum.
        w, exact = (
            f(weight.to(device), **options) for f in (nf4.nf4_quantize, reference.nf4_quantize)
        )
        what = f"{list(shape)} {quant_type}{' nested' if nested else ''}"
        yield "nf4_quantize", what, max(_distance(a, b) for a, b in zip(w.state, exact.state)), 0.0
        for dtype in DTYPES:
            error = _distance(nf4.nf4_dequantize(w, dtype), reference.nf4_dequantize(exact, dtype))
            yield "nf4_dequantize", f"{what} {_name(dtype)}", error, 0.0
        values = reference.nf4_values([t.cpu() for t in exact.state], shape, 64)
        for rows in (1, 9, 70, 600):
            for dtype in DTYPES:
                x = torch.randn(rows, shape[1], generator=generator).to(dtype)
                yield from _linear(x, w, values, f"{what} {_name(dtype)} {rows} rows")
    yield from _lora(device, generator)
    for activation in reference.ACTIVATIONS:
        for rows, dtype in ((1, torch.float32), *((70, dtype) for dtype in DTYPES)):
            yield from _adapter(rows, dtype, activation, device, generator)
    yield from _lsh(device, generator)
    yield from _reversible(device, generator)


def _reversible(
    device: torch.device, generator: torch.Generator
) -> Iterator[tuple[str, str, float, float]]:
    """To the bit."""
    for stream_dtype, bits in (
        (torch.float32, 16),
        (torch.int32, 16),
        (torch.float32, -1),
        (torch.bfloat16, -1),
    ):
        for dtype in DTYPES:
            stream, out = (torch.randn(5, 333, generator=generator) for _ in range(2))
            stream, found = (
                stream.mul(65536).round().div(1 if stream_dtype == torch.int32 else 65536),
                [],
            )
            for step, where in (
                (torch.ops.pyfast.reversible_step, device),
                (reference.reversible_step_op, "cpu"),
            ):
                flag = torch.zeros(1, dtype=torch.int32, device=where)
                found.append(stream.to(where, stream_dtype, copy=True))
                step(found[-1], out.to(where, dtype), True, bits, flag)
            yield (
                "reversible_step",
                f"{_name(stream_dtype)} {bits} bits, {_name(dtype)}",
                _distance(*found),
                0.0,
            )


def _lsh(
    device: torch.device, generator: torch.Generator
) -> Iterator[tuple[str, str, float, float]]:
    """Ids where no other bucket is nearly as near; attention by the same ids, and its gradients."""
    for preset in lsh_options.PRESETS:
        for n, dtype in ((1, torch.float32), *((300, dtype) for dtype in DTYPES)):
            qk, v, dy = (
                (torch.randn(2, 2, n, 40, generator=generator)).to(dtype) for _ in range(3)
            )
            case = f"{preset} {_name(dtype)} {n} tokens"
            ids = lsh_hash.lsh_buckets(qk.to(device), n_buckets=(8, 4), seed=7)
            exact = reference.lsh_buckets(qk.double(), n_buckets=(8, 4), seed=7)
            yield "lsh_hash", case, (ids.cpu() != exact).double().mean().item(), 0.002
            found = []
            for function, where, to in (
                (lsh_attention, device, dtype),
                (reference.lsh_attention, "cpu", dtype),
                (reference.lsh_attention, "cpu", torch.float64),
            ):
                given = [t.to(where, to).requires_grad_() for t in (qk, v)]
                options = {
                    "preset": preset,
                    "n_buckets": (8, 4),
                    "buckets": exact.to(where),
                    "chunk_length": 32,
                }
                y = function(*given, dropout_p=0.1, seed=5, **options)
                found.append([y, *torch.autograd.grad(y, given, dy.to(y))])
            for name, ours, torchs, true in zip(("", "_backward", "_backward"), *found):
                allowed = 2 * _distance(torchs, true) + torch.finfo(dtype).eps
                yield f"lsh_attention{name}", case, _distance(ours, true), allowed


def _adapter(rows, dtype, activation, device, generator) -> Iterator[tuple[str, str, float, float]]:
    """Of 96 values to 24, of which the signs are the same in any order of their sums."""
    shapes = ((rows, 96), (24, 96), (24,), (96, 24), (96,), (rows, 96))
    *tensors, dy = (
        (torch.randn(s, generator=generator).clamp(-4, 4) * 8).round().to(dtype) / 8 for s in shapes
    )
    found = []
    for function, given in (
        (adapter, [t.to(device) for t in tensors]),
        (reference.adapter, [t.float() for t in tensors]),
        (reference.adapter, [t.double() for t in tensors]),
    ):
        given = [t.requires_grad_() for t in given]
        y = function(*given, activation=activation, scaling=0.01)
        found.append([y, *torch.autograd.grad(y, given, dy.to(y))])
    case = f"{activation} {_name(dtype)} {rows} rows"
    for i, (ours, torchs, true) in enumerate(zip(*found)):
        # Hidden values are rounded too where tensor units ask for it; an activation errs by a few
        # last places.
        allowed = 2 * _distance(torchs.to(dtype), true) + 4 * torch.finfo(dtype).eps
        yield "adapter_backward" if i else "adapter", case, _distance(ours, true), allowed


def _linear(
    x: Tensor, w: nf4.NF4Weight, values: Tensor, case: str
) -> Iterator[tuple[str, str, float, float]]:
    x = x.to(w.device).requires_grad_()
    y = nf4.nf4_linear(x, w)
    dy = torch.randn(y.shape).to(x)
    dx = torch.autograd.grad(y, x, dy)[0]
    exact, dense = values.double(), values.to(x).float()
    for op, ours, torchs, true in (
        ("nf4_linear", y, F.linear(x.float(), dense), x.cpu().double() @ exact.t()),
        ("nf4_linear_backward", dx, dy.float() @ dense, dy.cpu().double() @ exact),
    ):
        # Twice the error of torch, had it accumulated in float32 and rounded once.
        yield (
            op,
            case,
            _distance(ours, true),
            2 * _distance(torchs.to(x), true) + _slack(x.dtype, x.device) / 4,
        )


def _lora(
    device: torch.device, generator: torch.Generator
) -> Iterator[tuple[str, str, float, float]]:
    """Forward and every gradient, DoRA and dropout included."""
    for base, rows in (("dense", 3), ("dense", 70), ("nf4", 3), ("nf4", 70), ("nf4", 600)):
        for dtype in DTYPES:
            shapes = {
                "x": (rows, 320),
                "lora_a": (16, 320),
                "lora_b": (200, 16),
                "bias": (200,),
                "magnitude": (200,),
            }
            args = {
                n: (torch.randn(s, generator=generator) / 4 + (len(s) == 1)).to(dtype)
                for n, s in shapes.items()
            }
            weight = torch.randn(200, 320, generator=generator).to(dtype)
            weight = nf4.nf4_quantize(weight) if base == "nf4" else weight
            results = []
            for function, where, to in (
                (lora.lora_linear, device, dtype),
                (reference.lora_linear, "cpu", torch.float64),
                (reference.lora_linear, "cpu", dtype),
            ):
                own = {n: t.to(where, to).requires_grad_() for n, t in args.items()}
                own_weight = weight.to(where) if base == "nf4" else weight.to(where, to)
                y = function(weight=own_weight, **own, scaling=2.0, dropout_p=0.1, seed=7)
                dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
                results.append([y, *torch.autograd.grad(y, list(own.values()), dy)])
            for name, ours, exact, torchs in zip(["y", *(f"d {n}" for n in args)], *results):
                allowed = 2 * _distance(torchs, exact) + _slack(dtype, device) / 2
                yield (
                    "lora_linear",
                    f"{base} {_name(dtype)} {rows} rows: {name}",
                    _distance(ours, exact),
                    allowed,
                )


def _distance(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||."""
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    return ((value - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def _slack(dtype: torch.dtype, device: torch.device) -> float:
    """A GPU adds up in another order than the plain torch of a CPU, which float32 alone shows."""
    return torch.finfo(dtype).eps * (4 if dtype == torch.float32 and device.type == "cuda" else 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
