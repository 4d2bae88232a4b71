"""patch and unpatch: change the forward of PEFT's and bitsandbytes' layers in a model, and back.

A layer's class becomes a subclass of itself that has another forward and nothing more. Parameters,
keys, files and copies stay as before, and so does everything else that PEFT does. A patched model
that is pickled as a whole needs pyfast to load.
"""

import sys
import types
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from pyfast._support import checks
from pyfast.nn.linear_layers import is_conv1d


class Patched(NamedTuple):
    """Summary of what `patch` changed in a model.

    Args:
        lora: how many of PEFT's LoRA layers run on pyfast's kernels.
        linear4bit: how many other Linear4bit layers of bitsandbytes do.
        left: the LoRA layers that do not: the reason of each, by name.

    Example:
        >>> import pyfast.hf
        >>> print(pyfast.hf.Patched(lora=2, linear4bit=12, left={}))
        2 LoRA layers and 12 other Linear4bit layers run on pyfast
    """

    lora: int
    linear4bit: int
    left: dict[str, str]

    def __str__(self) -> str:
        text = (
            f"{self.lora} LoRA layers and {self.linear4bit} other Linear4bit layers run on pyfast"
        )
        if not self.left:
            return text
        name, reason = next(iter(self.left.items()))
        return f"{text}; {len(self.left)} are left as they are, {name} because {reason}"


def patch(model: nn.Module) -> Patched:
    """Run PEFT's LoRA layers and bitsandbytes' Linear4bit layers on pyfast's kernels, in place.

    LoRA, rsLoRA and DoRA are served, with dropout and any bias, over nn.Linear, Conv1D or
    Linear4bit. In all other cases PEFT's forward runs as before: several active adapters,
    adapter_names, merged or disabled adapters, other variants. Layers that a later `add_adapter`
    makes run as PEFT's until the next call of `patch`. There is no second derivative.

    The weight of a Conv1D is laid out in memory like that of an nn.Linear, because it would be
    copied at every call otherwise. `unpatch` restores its layout.

    Args:
        model: a model with layers of PEFT or bitsandbytes.

    Returns:
        Patched: how many layers run on pyfast's kernels, and which LoRA layers do not.

    Raises:
        ValueError: if the model has no such layer.

    Example:
        >>> import peft, transformers, pyfast.hf
        >>> config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=64)
        >>> lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
        >>> model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
        >>> print(pyfast.hf.patch(model))
        2 LoRA layers and 0 other Linear4bit layers run on pyfast
    """
    checks.instance("model", model, nn.Module)
    replacements, left, bases = _replacements(), {}, set()
    for name, module in model.named_modules():
        if _is_lora(module):
            bases.add(id(module.base_layer))
        if type(module) in replacements:
            _swap_class(module, replacements[type(module)])
        if _is_lora(module) and type(module) not in replacements.values():
            left[name] = f"it is a {type(module).__name__}"
    patched = [module for module in model.modules() if type(module) in replacements.values()]
    if not patched:
        raise ValueError(_nothing_to_patch(left))
    _prepare_weights(patched)
    lora = [module for module in patched if _is_lora(module)]
    linear4bit = [module for module in patched if not _is_lora(module) and id(module) not in bases]
    return Patched(len(lora), len(linear4bit), left)


def unpatch(model: nn.Module) -> int:
    """Undo `patch`: give the layers their forward back.

    Args:
        model: a model after `patch`.

    Returns:
        int: how many layers were changed back, those under LoRA layers included.

    Raises:
        ValueError: if the model has no patched layer.

    Example:
        >>> import peft, transformers, pyfast.hf
        >>> config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=64)
        >>> lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
        >>> model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
        >>> patched = pyfast.hf.patch(model)
        >>> pyfast.hf.unpatch(model)
        2
    """
    checks.instance("model", model, nn.Module)
    originals = {replacement: original for original, replacement in _replacements().items()}
    patched = [module for module in model.modules() if type(module) in originals]
    if not patched:
        raise ValueError("model has no patched layer; patch comes before unpatch")
    for module in patched:
        _swap_class(module, originals[type(module)])
    for module in model.modules():
        if is_conv1d(module):
            module.weight.data = module.weight.data.contiguous()
    return len(patched)


# --- classes ---

# PEFT and bitsandbytes are optional and slow to import. These functions import pyfast's subclasses
# only if the program has imported the library already: before that, no model can have its layers.


def _peft_lora() -> dict[type, type]:
    from pyfast.hf import peft_lora

    return peft_lora.REPLACEMENTS


def _peft_lora_4bit() -> dict[type, type]:
    from pyfast.hf import peft_lora_4bit

    return peft_lora_4bit.REPLACEMENTS


def _bitsandbytes_layers() -> dict[type, type]:
    from pyfast.hf import bitsandbytes_layers

    return bitsandbytes_layers.REPLACEMENTS


_LOADERS: dict[str, Callable[[], dict[type, type]]] = {
    "peft.tuners.lora.layer": _peft_lora,
    "peft.tuners.lora.bnb": _peft_lora_4bit,
    "bitsandbytes.nn": _bitsandbytes_layers,
}


def _replacements() -> dict[type, type]:
    """Return the subclass for each class of the libraries that the program has imported."""
    replacements = {}
    for module_name, load in _LOADERS.items():
        if module_name in sys.modules:
            replacements |= load()
    return replacements


def _swap_class(module: nn.Module, new_class: type) -> None:
    """Change the module's class, and the forward that accelerate's hooks keep in the module."""
    old_forward, module.__class__ = type(module).forward, new_class
    for attribute in ("forward", "_old_forward"):
        bound = module.__dict__.get(attribute)
        if isinstance(bound, types.MethodType) and bound.__func__ is old_forward:
            setattr(module, attribute, types.MethodType(new_class.forward, module))


def _prepare_weights(modules: list[nn.Module]) -> None:
    """Lay out weights so that the ops take them without a copy: unpack 4-bit, transpose Conv1D."""
    if "bitsandbytes.nn" in sys.modules:
        from pyfast.hf import bitsandbytes_layers  # imports bitsandbytes, which is optional

        for module in modules:
            if type(module) in bitsandbytes_layers.REPLACEMENTS.values():
                bitsandbytes_layers.unpack_weight(module)
    for module in modules:
        if _is_lora(module) and is_conv1d(module.base_layer):
            weight = module.base_layer.weight
            weight.data = weight.data.t().contiguous().t()


def _is_lora(module: nn.Module) -> bool:
    peft_layers = sys.modules.get("peft.tuners.lora.layer")
    return peft_layers is not None and isinstance(module, peft_layers.LoraLayer)


def _nothing_to_patch(left: dict[str, str]) -> str:
    if not left:
        return (
            "model has no LoRA layer of PEFT's and no Linear4bit of bitsandbytes'; there is "
            "nothing to patch"
        )
    name, reason = next(iter(left.items()))
    return (
        f"model has no LoRA layer over a linear one, dense or 4-bit, to patch; of {name}, {reason}"
    )
