"""A small model, and adapter directories that it writes, reads and refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pyfast

PREFIX = "base_model.model."
A_KEY, B_KEY = f"{PREFIX}0.lora_A.weight", f"{PREFIX}0.lora_B.weight"
INPUT = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def adapted(seed=0, **options):
    config = {"r": 4, "alpha": 8, "targets": ["0"], "modules_to_save": ["2"], **options}
    model = pyfast.add_lora(net(), pyfast.LoRAConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def saved(directory, **options):
    """Write an adapter; return its model, its configuration and its tensors."""
    model = adapted(**options)
    pyfast.save_adapter(model, directory)
    fields = json.loads((directory / "adapter_config.json").read_text())
    return model, fields, load_file(directory / "adapter_model.safetensors")


def assert_refused(directory, message):
    model = net()
    with pytest.raises(pyfast.CheckpointError, match=message):
        pyfast.load_adapter(model, directory)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(
        model(INPUT), net()(INPUT)
    )
