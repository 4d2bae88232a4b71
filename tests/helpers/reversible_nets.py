"""Blocks for the tests of reversible sequences, and comparisons of their runs."""

import torch
import torch.nn.functional as F
from torch import nn

import pyfast


class Mlp(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.dropout, self.calls = dropout, 0

    def forward(self, x):
        self.calls += 1
        return F.dropout(self.down(F.gelu(self.up(self.norm(x)))), self.dropout, self.training)


class Attention(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.dropout = dropout

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(y.squeeze(1))


def sequence(
    n_blocks: int, width: int = 8, dropout: float = 0.0, **options
) -> pyfast.ReversibleSequence:
    blocks = [(Attention(width, dropout), Mlp(width, dropout)) for _ in range(n_blocks)]
    return pyfast.ReversibleSequence(blocks, **options)


def streams(
    width: int = 8, dtype: torch.dtype = torch.float32, grad: bool = True, device="cpu"
) -> list[torch.Tensor]:
    return [
        torch.randn(2, 5, width, dtype=dtype, device=device).requires_grad_(grad) for _ in range(2)
    ]


def loss_of(y1, y2):
    return (
        y1.double() * torch.linspace(-1, 1, y1.numel(), device=y1.device).view_as(y1)
    ).sum() + y2.double().square().sum()


def step(seq, x1, x2, *args, autocast=False, seed=7, **kwargs) -> list[torch.Tensor]:
    """Return the outputs, and the gradients of all tensors that require one."""
    torch.manual_seed(seed)
    with torch.autocast(x1.device.type, torch.bfloat16, enabled=autocast):
        y1, y2 = seq(x1, x2, *args, **kwargs)
    wanted = [t for t in (x1, x2, *seq.parameters()) if t.requires_grad]
    return [y1, y2, *torch.autograd.grad(loss_of(y1, y2), wanted, allow_unused=True)]


def stored(seq, *args, **kwargs) -> list[torch.Tensor]:
    """Run `step` with stored activations."""
    seq.store = True
    try:
        return step(seq, *args, **kwargs)
    finally:
        seq.store = False


def assert_same(found, wanted) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert torch.equal(a, b), (a - b).abs().max()


def assert_close(found, wanted, tolerance=1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-12, ((a - b).norm() / b.norm()).item()
