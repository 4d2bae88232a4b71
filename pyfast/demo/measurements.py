"""Measurements of the three parts that save memory: LSH attention, reversible layers, 4 bits."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfast._support.measure import held_bytes, peak_bytes, seconds
from pyfast.models.reformer.config import ReformerConfig
from pyfast.models.reformer.model import Reformer
from pyfast.nn.nf4_linear import NF4Linear
from pyfast.ops.lsh_attention import lsh_attention

HEADS, HEAD_DIM = 2, 64
MATRIX_BYTES = 128 << 20  # the largest matrix of scores that is computed


def measure_attention(lengths: tuple[int, ...], device: torch.device) -> Iterator[dict]:
    """Measure forward and backward of three attentions at each length.

    They are LSH attention, torch's fused exact attention, and exact attention that computes the
    whole matrix of scores. The last is left out where the matrix is over MATRIX_BYTES.
    """
    for length in lengths:
        shape = (1, HEADS, length, HEAD_DIM)
        q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
        yield _measure("LSH", _lsh_attention, q, k, v)
        yield _measure("exact, fused", _fused_attention, q, k, v)
        if HEADS * length * length * 4 <= MATRIX_BYTES:
            yield _measure("exact, whole matrix", _matrix_attention, q, k, v)


def _measure(name: str, attention: Callable, q: Tensor, k: Tensor, v: Tensor) -> dict:
    """Return the time and the peak memory of a forward and backward pass."""

    def step() -> None:
        torch.autograd.grad(attention(q, k, v).sum(), (q, k, v), allow_unused=True)

    row = {"way": name, "length": q.shape[-2]}
    row["seconds"] = seconds(step, q.device, rounds=2)
    row["bytes"] = peak_bytes(step, q.device)
    return row


def _lsh_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lsh_attention(q, v, n_hashes=1, seed=0)  # queries are the keys, too


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _matrix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def measure_depth(depths: tuple[int, ...], length: int, device: torch.device) -> Iterator[dict]:
    """Measure forward and backward of a Reformer at each number of layers.

    The activations are stored in one run and recomputed in the other. Bytes are the peak beside
    the parameters.
    """
    for layers in depths:
        row, gradients = {"layers": layers, "tokens": length}, []
        for name, store in (("stored", True), ("reversible", False)):
            model = _make_reformer(layers, length, store).to(device)
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(256, (1, length), generator=generator).to(device)

            def step(model=model, ids=ids) -> tuple[Tensor, ...]:
                return torch.autograd.grad(model(ids, labels=ids), list(model.parameters()))

            row[f"{name}_seconds"] = seconds(step, device, rounds=2)
            row[f"{name}_bytes"] = peak_bytes(step, device)
            gradients.append(step())
        row["same_gradients"] = all(map(torch.equal, *gradients))
        yield row


def _make_reformer(layers: int, length: int, store: bool) -> Reformer:
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=256,
        width=128,
        heads=2,
        hidden=256,
        layers=tuple(("local", "lsh")[i % 2] for i in range(layers)),
        max_length=length,
        n_hashes=1,
        hash_seed=0,
        store=store,
        exact=True,
    )
    return Reformer(config)


@torch.no_grad()
def measure_four_bits(size: int, row_counts: tuple[int, ...], device: torch.device) -> dict:
    """Measure a linear layer of size x size in 4 bits beside the same layer in float32.

    Returns bytes, relative error, and the time of a forward pass by the number of rows.
    """
    dense = nn.Linear(size, size, bias=False, device=device)
    quantized = NF4Linear.from_linear(dense)
    x = torch.randn(64, size, device=device)
    exact = dense(x)
    result = {"width": size, "dense_bytes": held_bytes(dense)}
    result["bytes"] = quantized.nf4_weight.nbytes
    result["error"] = ((quantized(x) - exact).norm() / exact.norm()).item()
    result["rows"] = []
    for rows in row_counts:
        part = x[:rows]
        times = {"rows": rows}
        times["dense_seconds"] = seconds(lambda part=part: dense(part), device, rounds=5)
        times["seconds"] = seconds(lambda part=part: quantized(part), device, rounds=5)
        result["rows"].append(times)
    return result
