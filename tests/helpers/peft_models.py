"""Models of PEFT, patched copies, and one training step of each."""

import copy

import torch
from helpers.tiny_pretrained import output
from helpers.tolerance import relative_error
from peft import LoraConfig, get_peft_model

from pyfast import hf

LORA_OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "heads": {
        "modules_to_save": ["lm_head", "classifier"],
        "target_modules": r".*(q_proj|query|c_attn|value)",
    },
}


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def make_peft_model(base, **options):
    return perturb(get_peft_model(base, LoraConfig(**{"target_modules": "all-linear", **options})))


def patched_copy(model):
    """Return a copy with pyfast's kernels."""
    model = copy.deepcopy(model)
    hf.patch(model)
    return model


def step(model):
    model.zero_grad()
    y = output(model)
    y.float().pow(2).mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(patched, peft_model, tolerance=1e-5):
    (y, grads), (peft_y, peft_grads) = step(patched), step(peft_model)
    assert y.dtype == peft_y.dtype and relative_error(y, peft_y) < tolerance
    assert grads.keys() == peft_grads.keys() and grads
    # The gradient of the keys' bias is zero but for rounding.
    floor = 1e-3 * max(g.norm() for g in peft_grads.values())
    for name, expected in peft_grads.items():
        assert (grads[name] - expected).norm() < 10 * tolerance * max(expected.norm(), floor), name


def assert_close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)
