"""What takes memory besides parameters, and what the package has instead: attention, depth, weights."""

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
MATRIX_BYTES = 128 << 20  # the largest matrix of scores that is made


def attention(lengths: tuple[int, ...], device: torch.device) -> Iterator[dict]:
    """Forward and backward by the length: the whole matrix, torch's fused exact attention, LSH attention."""
    for length in lengths:
        q, k, v = (
            torch.randn(1, HEADS, length, HEAD_DIM, device=device, requires_grad=True)
            for _ in range(3)
        )
        ways: dict[str, Callable[[], Tensor]] = {
            "LSH": lambda q=q, v=v: lsh_attention(q, v, n_hashes=1, seed=0),
            "exact, fused": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True
            ),
        }
        if HEADS * length * length * 4 <= MATRIX_BYTES:
            ways["exact, whole matrix"] = lambda q=q, k=k, v=v: _whole(q, k, v)
        for name, forward in ways.items():

            def step(forward=forward, inputs=(q, k, v)) -> None:
                torch.autograd.grad(forward().sum(), inputs, allow_unused=True)

            measured = {
                "seconds": seconds(step, device, rounds=2),
                "bytes": peak_bytes(step, device),
            }
            yield {"way": name, "length": length} | measured


def _whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def depth(numbers: tuple[int, ...], length: int, device: torch.device) -> Iterator[dict]:
    """Forward and backward of a Reformer by its layers, activations kept or computed again; bytes beside parameters."""
    for layers in numbers:
        row, gradients = {"layers": layers, "tokens": length}, []
        for name, store in (("stored", True), ("reversible", False)):
            torch.manual_seed(0)
            kinds = tuple(("local", "lsh")[i % 2] for i in range(layers))
            sizes = {"width": 128, "heads": 2, "hidden": 256, "max_length": length, "n_hashes": 1}
            config = ReformerConfig(
                vocab_size=256, layers=kinds, store=store, exact=True, hash_seed=0, **sizes
            )
            model = Reformer(config).to(device)
            ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0)).to(
                device
            )

            def step(model=model, ids=ids) -> tuple[Tensor, ...]:
                return torch.autograd.grad(model(ids, labels=ids), list(model.parameters()))

            row[f"{name}_seconds"] = seconds(step, device, rounds=2)
            row[f"{name}_bytes"] = peak_bytes(step, device)
            gradients.append(step())
        row["same_gradients"] = all(map(torch.equal, *gradients))
        yield row


@torch.no_grad()
def four_bits(width: int, rows: tuple[int, ...], device: torch.device) -> dict:
    """A linear layer in 4 bits beside the same in float32: bytes, error, time of a forward."""
    dense = nn.Linear(width, width, bias=False, device=device)
    packed = NF4Linear.from_linear(dense)
    x = torch.randn(64, width, device=device)
    exact = dense(x)
    found = {"width": width, "dense_bytes": held_bytes(dense), "bytes": packed.nf4_weight.nbytes}
    found["error"] = ((packed(x) - exact).norm() / exact.norm()).item()
    found["rows"] = [
        {
            "rows": n,
            "dense_seconds": seconds(lambda x=x[:n]: dense(x), device, rounds=5),
            "seconds": seconds(lambda x=x[:n]: packed(x), device, rounds=5),
        }
        for n in rows
    ]
    return found
