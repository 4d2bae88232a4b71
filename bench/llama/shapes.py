"""Llamas of real shapes with random weights, made and handed over one layer at a time, and something to read."""

from collections.abc import Callable

import torch
from torch import nn

SHAPES = {
    # hidden, intermediate, layers, heads, heads of keys and values, vocabulary
    "toy": (64, 128, 2, 4, 2, 256),
    "1b": (2048, 5632, 22, 32, 4, 32000),  # TinyLlama
    "7b": (4096, 11008, 32, 32, 32, 32000),  # Llama 2
    "8b": (4096, 14336, 32, 32, 8, 128256),  # Llama 3
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 80, 64, 8, 32000),
}
PIECE = 1 << 22  # random numbers at a time


def config(shape: str, layers: int | None = None):
    width, hidden, depth, *rest = SHAPES[shape]
    return settings(width, hidden, layers or depth, *rest)


def settings(width: int, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int):
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return LlamaConfig(**sizes, use_cache=False, attn_implementation="sdpa")


def build(config, linear: Callable[[torch.Tensor], nn.Module], dtype: torch.dtype, device: str):
    """A causal Llama, each of whose layers' linear modules is linear(weight in bfloat16); the rest
    is in dtype.

    The numbers are the same for every `linear`: each weight has a seed of its own.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = _rotary(model, device)
    for seed, (name, module) in enumerate(list(model.named_modules())):
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if weight.dim() == 1:
            module.weight = nn.Parameter(torch.ones(weight.shape, dtype=dtype, device=device))
        elif name.startswith("model.layers."):
            model.set_submodule(name, linear(random(weight.shape, seed, device)))
        else:
            module.weight = nn.Parameter(random(weight.shape, seed, device).to(dtype))
    return model


def _rotary(model: nn.Module, device: str) -> nn.Module:
    rotary = model.model.rotary_emb
    with torch.device(device):
        return type(rotary)(rotary.config)


def random(shape: torch.Size, seed: int, device: str) -> torch.Tensor:
    """Uniform numbers in bfloat16, rows of norm 1, and little beside them while they are drawn."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for piece in weight.view(-1).split(PIECE):
        # Eight at a time: billions of normal ones take minutes on a CPU.
        bits = torch.empty(-(-len(piece) // 8), dtype=torch.int64, device=device)
        octets = bits.random_(-(2**63), None, generator=generator).view(torch.int8)[: len(piece)]
        piece.copy_(octets).add_(0.5).mul_((3 / shape[-1]) ** 0.5 / 128)
    return weight


def tokens(vocabulary: int, batch: int, length: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(device)
