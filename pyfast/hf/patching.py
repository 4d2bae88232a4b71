"""patch and unpatch: the layers of PEFT and bitsandbytes in a model get pyfast's forward, and their
own back.

A layer's class becomes a subclass of itself, which has another forward and nothing more:
parameters, keys, files and copies are as before, and so is all else that PEFT does. A model that is
pickled whole, patched, needs pyfast to load.
"""

import importlib
import sys
import types
from typing import NamedTuple

from torch import nn

from pyfast._support import checks
from pyfast.nn.linear_layers import is_conv1d

# Which of our modules has the subclasses for layers of which other: nobody's is imported before it
# is needed.
_SUBCLASSES = {
    "peft.tuners.lora.layer": "pyfast.hf.peft_lora",
    "peft.tuners.lora.bnb": "pyfast.hf.peft_lora_4bit",
    "bitsandbytes.nn": "pyfast.hf.bitsandbytes_layers",
}


class Patched(NamedTuple):
    """How many layers of the model run on pyfast's kernels; `left`: LoRA layers that do not, by name, and why."""

    lora: int
    linear4bit: int
    left: dict[str, str]

    def __str__(self) -> str:
        text = (
            f"{self.lora} LoRA layers and {self.linear4bit} other Linear4bit layers run on pyfast"
        )
        if not self.left:
            return text
        name, why = next(iter(self.left.items()))
        return f"{text}; {len(self.left)} are left as they are, {name} because {why}"


def patch(model: nn.Module) -> Patched:
    """Has PEFT's LoRA layers and bitsandbytes' Linear4bit layers run on pyfast's kernels. In place;
    says how many.

    LoRA, rsLoRA and DoRA with dropout and any bias, over nn.Linear, Conv1D or Linear4bit. What a
    layer does otherwise (several active adapters, adapter_names, merged, switched off, other
    variants) PEFT does as before. Layers that add_adapter makes anew run as PEFT's own until the
    next call, which adds them. There is no second derivative. The weight of a Conv1D is laid out in
    memory as an nn.Linear's, or it would be copied at every call; `unpatch` lays it back.
    """
    checks.instance("model", model, nn.Module)
    fast, left, bases = _classes(), {}, set()
    for name, module in model.named_modules():
        if _is_lora(module):
            bases.add(id(module.base_layer))
        if type(module) in fast:
            _swap(module, fast[type(module)])
        if _is_lora(module) and type(module) not in fast.values():
            left[name] = f"it is a {type(module).__name__}"
    ours = [module for module in model.modules() if type(module) in fast.values()]
    if not ours:
        raise ValueError(_nothing(left))
    _prepare(ours)
    lora = sum(_is_lora(module) for module in ours)
    return Patched(lora, sum(not _is_lora(m) and id(m) not in bases for m in ours), left)


def unpatch(model: nn.Module) -> int:
    """Undoes `patch`; says for how many layers."""
    checks.instance("model", model, nn.Module)
    plain = {fast: own for own, fast in _classes().items()}
    ours = [module for module in model.modules() if type(module) in plain]
    if not ours:
        raise ValueError("model has no patched layer; patch comes before unpatch")
    for module in ours:
        _swap(module, plain[type(module)])
    for module in model.modules():
        if is_conv1d(module):
            module.weight.data = module.weight.data.contiguous()
    return len(ours)


def _classes() -> dict[type, type]:
    """Their classes and ours, of the libraries that the model can have layers of."""
    found = {}
    for theirs, mine in _SUBCLASSES.items():
        if theirs in sys.modules:
            found |= importlib.import_module(mine).FAST
    return found


def _swap(module: nn.Module, new: type) -> None:
    before, module.__class__ = type(module).forward, new
    for slot in ("forward", "_old_forward"):  # accelerate's hooks keep the forward that they found
        held = module.__dict__.get(slot)
        if isinstance(held, types.MethodType) and held.__func__ is before:
            setattr(module, slot, types.MethodType(new.forward, module))


def _prepare(modules: list[nn.Module]) -> None:
    """Weights as the ops take them without a copy: not repacked, and of a Conv1D not transposed."""
    four_bit = (
        importlib.import_module("pyfast.hf.bitsandbytes_layers")
        if "bitsandbytes.nn" in sys.modules
        else None
    )
    for module in modules:
        if four_bit is not None and isinstance(module, tuple(four_bit.FAST.values())):
            four_bit.restore(module)
        elif _is_lora(module) and is_conv1d(module.base_layer):
            weight = module.base_layer.weight
            weight.data = weight.data.t().contiguous().t()


def _is_lora(module: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.lora.layer")
    return peft is not None and isinstance(module, peft.LoraLayer)


def _nothing(left: dict[str, str]) -> str:
    if not left:
        return "model has no LoRA layer of PEFT's and no Linear4bit of bitsandbytes'; there is nothing to patch"
    name, why = next(iter(left.items()))
    return f"model has no LoRA layer over a linear one, dense or 4-bit, to patch; of {name}, {why}"
