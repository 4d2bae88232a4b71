"""Llamas of real shapes with random weights, built one layer at a time, and tokens for them."""

from collections.abc import Callable

import torch
from torch import nn

SHAPES = {
    # hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary
    "toy": (64, 128, 2, 4, 2, 256),
    "1b": (2048, 5632, 22, 32, 4, 32000),  # TinyLlama
    "7b": (4096, 11008, 32, 32, 32, 32000),  # Llama 2
    "8b": (4096, 14336, 32, 32, 8, 128256),  # Llama 3
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 80, 64, 8, 32000),
}
PIECE = 1 << 22  # random numbers at a time


def make_config(shape: str, layers: int | None = None):
    """Return transformers' config of a named shape."""
    width, hidden, depth, *rest = SHAPES[shape]
    return make_config_of_sizes(width, hidden, layers or depth, *rest)


def make_config_of_sizes(
    width: int, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int
):
    """Return transformers' config of these sizes."""
    from transformers import LlamaConfig  # optional, and takes seconds to import

    return LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
        attn_implementation="sdpa",
    )


def build(
    config, make_linear: Callable[[torch.Tensor], nn.Module], dtype: torch.dtype, device: str
):
    """Build a causal Llama whose layers' linear modules are make_linear(weight in bfloat16).

    The rest is in `dtype`. The numbers are the same for every `make_linear`, since each weight has
    a seed of its own.
    """
    from transformers import LlamaForCausalLM  # optional, and takes seconds to import

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = _make_rotary(model, device)
    for seed, (name, module) in enumerate(list(model.named_modules())):
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if weight.dim() == 1:
            module.weight = nn.Parameter(torch.ones(weight.shape, dtype=dtype, device=device))
        elif name.startswith("model.layers."):
            model.set_submodule(name, make_linear(draw_weight(weight.shape, seed, device)))
        else:
            module.weight = nn.Parameter(draw_weight(weight.shape, seed, device).to(dtype))
    return model


def _make_rotary(model: nn.Module, device: str) -> nn.Module:
    rotary = model.model.rotary_emb
    with torch.device(device):
        return type(rotary)(rotary.config)


def draw_weight(shape: torch.Size, seed: int, device: str) -> torch.Tensor:
    """Return uniform numbers in bfloat16, with rows of norm 1.

    They are drawn in pieces, so that drawing takes little memory.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for piece in weight.view(-1).split(PIECE):
        # Eight at a time: billions of normal ones take minutes on a CPU.
        bits = torch.empty(-(-len(piece) // 8), dtype=torch.int64, device=device)
        octets = bits.random_(-(2**63), None, generator=generator).view(torch.int8)[: len(piece)]
        piece.copy_(octets).add_(0.5).mul_((3 / shape[-1]) ** 0.5 / 128)
    return weight


def draw_tokens(vocabulary: int, batch: int, length: int, device: str) -> torch.Tensor:
    """Return the same random tokens for all models."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(device)
