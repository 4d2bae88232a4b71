"""The layers that adapters go to: which can have adapters, and which is the output head."""

from collections.abc import Mapping

from torch import nn

from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.trained_copies import TrainedCopies
from pyfast.nn.linear_layers import (
    LINEAR_LAYER_RULE,
    conversion_hint,
    is_linear,
    is_linear_like,
)


def is_adaptable(module: nn.Module) -> bool:
    """Return whether the module is a linear layer, with or without adapters and trained copies."""
    module = module.base if isinstance(module, TrainedCopies) else module
    return isinstance(module, LoRALinear) or is_linear(module)


def check_targets(
    targets: object, layers: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> None:
    """Raise an error unless the targets name at least one layer, and linear layers alone.

    Args:
        targets: what the user asked for; it appears in the message.
        layers: the modules that the targets name.
        modules: all modules of the model.
    """
    if not layers:
        ends = {name.rpartition(".")[2] for name, m in modules.items() if is_adaptable(m)}
        raise ValueError(
            f"targets {targets!r} match no layer; the model's linear layers are called "
            f"{sorted(ends)}"
        )
    for name, module in layers.items():
        if isinstance(module, TrainedCopies) or not is_adaptable(module):
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}; it must be a linear layer"
            )


def check_all_adaptable(modules: Mapping[str, nn.Module]) -> None:
    """Raise TypeError if "all-linear" would leave out a layer of these in silence."""
    refused = {
        name: module
        for name, module in modules.items()
        if is_linear_like(module) and not is_adaptable(module)
    }
    if refused:
        module = next(iter(refused.values()))
        names = ", ".join([*list(refused)[:4], *(["..."] if len(refused) > 4 else [])])
        raise TypeError(
            f"targets is 'all-linear', but {names} ({type(module).__name__}) cannot be adapted; "
            f"each must be {LINEAR_LAYER_RULE}, or in exclude{conversion_hint(module)}"
        )


def output_head(model: nn.Module, task_type: str | None) -> nn.Module | None:
    """Return the model's output layer by transformers' conventions, or None."""
    get_head = getattr(model, "get_output_embeddings", None)
    if not callable(get_head):
        return None
    head = get_head()
    if head is None and task_type == "SEQ_CLS":
        heads = [getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)]
        head = heads[0] if heads else None
    return head
