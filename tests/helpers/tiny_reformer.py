"""A small Reformer and its inputs."""

import torch
from torch.nn import functional as F

from pyfast import Reformer, ReformerConfig

VOCAB = 50


def config(**options):
    sizes = {"width": 24, "heads": 3, "layers": ("local", "lsh"), "hidden": 40, "max_length": 256}
    return ReformerConfig(
        VOCAB, **sizes | {"lsh_chunk": 16, "local_chunk": 16, "hash_seed": 3} | options
    )


def model(seed=0, **options):
    torch.manual_seed(seed)
    model = Reformer(config(**options))
    for parameter in model.parameters():  # so that none is zero or too small to matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ids(length, batch=2, device="cpu"):
    return torch.randint(VOCAB, (batch, length), device=device)


def loss_by_hand(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
