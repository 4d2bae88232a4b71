"""Replacing modules of a model in place."""

from torch import nn


def inner(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, parallel) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model


def check_replicas(model: nn.Module) -> None:
    """Whether other parameters than now can train."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is a DistributedDataParallel, which takes no new parameters; it must be the one inside"
        )


def replace_modules(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Puts modules in the place of others, given by id, wherever those are."""
    for parent in list(model.modules()):
        if id(parent) not in {id(module) for module in new.values()}:
            for child_name, child in list(parent._modules.items()):
                if id(child) in new and new[id(child)] is not child:
                    put(parent, child_name, new[id(child)])


def put(parent: nn.Module, child_name: str, child: nn.Module) -> None:
    setattr(parent, child_name, child)
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # or torch reads the weights in eval, past the layers
