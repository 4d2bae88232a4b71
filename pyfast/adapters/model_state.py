"""Record of a model's adapters, and a walk over its modules as they were before any was added."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from pyfast.adapters.adapter_host import AdapterHost
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.bottleneck.layer import BottleneckLinear
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.module_names import check_adapter_name
from pyfast.adapters.module_tree import check_accepts_parameters, unwrap_model
from pyfast.adapters.trained_copies import TrainedCopies

Config = LoRAConfig | AdapterConfig
_ATTRIBUTE = "_pyfast_adapters"


@dataclass
class AdapterState:
    """The adapters of a model, or the patterns of the parameters that `select` chose instead."""

    configs: dict[str, Config] = field(default_factory=dict)
    active: str | None = None
    selected: tuple[str, ...] = ()


def adapter_state(model: nn.Module) -> AdapterState:
    """Return the model's adapters; empty if nothing was added or selected."""
    return unwrap_model(model).__dict__.get(_ATTRIBUTE, AdapterState())


def set_adapter_state(model: nn.Module, state: AdapterState | None) -> None:
    """Record the model's adapters, or with None forget them."""
    model = unwrap_model(model)
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        setattr(model, _ATTRIBUTE, state)


def walk_original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with their names before any adapter was added, none from inside wrappers.

    A layer with a bottleneck adapter comes twice: the BottleneckLinear, and the LoRALinear or
    plain layer in it.
    """
    inside = None
    for name, module in list(unwrap_model(model).named_modules()):
        if inside is not None and name.startswith(inside):
            continue
        yield name, module
        if isinstance(module, BottleneckLinear):
            yield name, module.base
        if isinstance(module, AdapterHost | TrainedCopies):
            inside = f"{name}." if name else ""


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRALinear layers by name."""
    modules = walk_original_modules(model)
    return {name: module for name, module in modules if isinstance(module, LoRALinear)}


def check_unmerged(model: nn.Module, operation: str) -> None:
    """Raise RuntimeError if an adapter is merged into a layer of the model."""
    for layer in lora_layers(model).values():
        layer.check_unmerged(operation)


def check_known(model: nn.Module, name: str | None) -> None:
    """Raise ValueError unless the model has an adapter of this name; None is no adapter."""
    configs = adapter_state(model).configs
    if name is not None and name not in configs:
        raise ValueError(
            f"adapter {name!r} is unknown; this model has {sorted(configs) or 'no adapters'}"
        )


def check_new(model: nn.Module, name: str) -> None:
    """Raise an error unless an adapter of this name can be added to the model."""
    check_adapter_name(name)
    check_accepts_parameters(model)
    if name in adapter_state(model).configs:
        raise ValueError(f"name is {name!r}, which the model has already; it must be new")
    check_unmerged(model, "a new adapter")
