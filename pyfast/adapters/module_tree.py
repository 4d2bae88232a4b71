"""The tree of a model's modules, and replacing modules in place."""

from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and of data parallelism."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, parallel) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model


def check_accepts_parameters(model: nn.Module) -> None:
    """Raise ValueError if the model is a DistributedDataParallel.

    That wrapper reduces the gradients of the parameters that it was made with, and of no others.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is a DistributedDataParallel, which takes no new parameters; it must be the "
            "one inside"
        )


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Replace modules wherever they are in the model; the keys are ids of the old modules."""
    new_ids = {id(module) for module in replacements.values()}
    for parent in list(model.modules()):
        if id(parent) in new_ids:
            continue
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacements and replacements[id(child)] is not child:
                replace_child(parent, child_name, replacements[id(child)])


def replace_child(parent: nn.Module, child_name: str, child: nn.Module) -> None:
    """Set a child of a module, and keep torch from computing past it."""
    setattr(parent, child_name, child)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Otherwise torch's fast path reads the weights in eval mode and calls no layer.
        parent.activation_relu_or_gelu = 0
