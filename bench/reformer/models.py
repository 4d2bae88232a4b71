"""A Transformer of a Reformer's size, and a text for both to learn."""

import torch
import torch.nn.functional as F
from torch import nn

import pyfast
from pyfast.models.reformer.layers import AxialPositions


class Block(nn.Module):
    """Block of a Transformer: exact attention, activations stored."""

    def __init__(self, config: pyfast.ReformerConfig):
        super().__init__()
        inner, width = config.heads * config.head_dim, config.width
        self.heads = config.heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.up = nn.Linear(width, config.hidden)
        self.down = nn.Linear(config.hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Transformer of the sizes of a Reformer's config; its types of attention do not matter."""

    def __init__(self, config: pyfast.ReformerConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = AxialPositions(config.axial_shape, config.axial_widths)
        self.blocks = nn.ModuleList(Block(config) for _ in config.layers)
        self.norm = nn.LayerNorm(config.width)
        residual_std = config.init_std / (2 * len(config.layers)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                is_residual = "out" in name or "down" in name
                nn.init.normal_(parameter, std=residual_std if is_residual else config.init_std)

    def forward(self, ids: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of predicting each token from those before it."""
        x = self.tokens(ids) + self.positions(0, ids.shape[1])
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x[:, :-1]), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


MODELS = {"Reformer": pyfast.Reformer, "Transformer": Transformer}


def load_text() -> torch.Tensor:
    """Return the prose of Python's own documentation, some 700 KB, as bytes."""
    from pydoc_data.topics import topics  # 700 KB that only some benches need

    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(prose.encode()), dtype=torch.uint8).long()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
