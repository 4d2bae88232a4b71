"""The adapters of a model: which modules they change, putting them in and out, and their tensors by name."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from pyfast.adapters.adapted_layer import AdaptedLayer
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.bottleneck.layer import AdapterLinear
from pyfast.adapters.lora import shared_input
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.module_names import check_name
from pyfast.adapters.module_tree import check_replicas, inner, replace_modules
from pyfast.adapters.trained_copies import SavedModule
from pyfast.nn.nf4_linear import NF4Linear

ORIGINAL_BIAS = "original_bias"  # beside `bias`, where an adapter has its own, `bias_of_<adapter>`
Config = LoRAConfig | AdapterConfig


@dataclass
class Adapters:
    """What a model knows of its adapters, or of the parameters that `select` chose instead."""

    configs: dict[str, Config] = field(default_factory=dict)
    active: str | None = None
    selected: tuple[str, ...] = ()  # patterns


class Plan(NamedTuple):
    """What an adapter changes, by name, in a model that has not been touched yet."""

    targets: dict[str, AdaptedLayer]  # new ones are not in the model
    saved: dict[str, SavedModule]  # likewise
    biases: dict[str, nn.Module]


def adapters_of(model: nn.Module) -> Adapters:
    return inner(model).__dict__.get("_pyfast_adapters", Adapters())


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by their names before any adapter was added: nothing inside the wrappers.

    What has both kinds of adapters comes twice, the bottleneck's wrapper and the LoRALinear or
    plain layer in it.
    """
    inside = None
    for name, module in list(inner(model).named_modules()):
        if inside is not None and name.startswith(inside):
            continue
        yield name, module
        if isinstance(module, AdapterLinear):
            yield name, module.base
        if isinstance(module, AdaptedLayer | SavedModule):
            inside = f"{name}." if name else ""


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in parts(model) if isinstance(module, LoRALinear)}


def check_unmerged(model: nn.Module, what: str) -> None:
    for layer in lora_layers(model).values():
        layer.check_unmerged(what)


def check_known(model: nn.Module, name: str | None) -> None:
    known = adapters_of(model).configs
    if name is not None and name not in known:
        raise ValueError(
            f"adapter {name!r} is unknown; this model has {sorted(known) or 'no adapters'}"
        )


def check_new(model: nn.Module, name: str) -> None:
    """Whether another adapter of this name can be added."""
    check_name(name)
    check_replicas(model)
    if name in adapters_of(model).configs:
        raise ValueError(f"name is {name!r}, which the model has already; it must be new")
    check_unmerged(model, "a new adapter")


def plan(model: nn.Module, name: str, config: Config) -> Plan:
    """All that could be wrong with a new adapter is said here, before anything is changed."""
    check_new(model, name)
    found = dict(parts(model))
    wrapped = {path: module for path, module in parts(model) if isinstance(module, config.layer)}
    targets = {}
    for path, module in config.targets_of(inner(model), found).items():
        layer = wrapped[path] if path in wrapped else config.layer(module)
        try:
            config.check_add(layer, name, path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        targets[path] = layer
    saved = _saved(found, config)
    for path in targets:
        if any(path == outer or path.startswith(f"{outer}.") for outer in saved):
            raise ValueError(
                f"modules_to_save takes in {path}, which is a target, too; it must be one of the two"
            )
    biases = _biases(found, {**targets, **saved}) if config.bias == "all" else {}
    return Plan(targets, saved, biases)


def _biases(found: dict[str, nn.Module], taken: Iterable[str]) -> dict[str, nn.Module]:
    """The modules outside the wrappers that have one."""
    others = [
        p for p, m in found.items() if isinstance(m, AdaptedLayer | SavedModule) and p not in taken
    ]
    if others:
        raise ValueError(
            f"bias is 'all', but {others[0]} is another adapter's; it must be 'none' or 'lora_only'"
        )
    return {
        p: m for p, m in found.items() if p not in taken and m._parameters.get("bias") is not None
    }


def check_apart(model: nn.Module, targets: Iterable[str]) -> None:
    """PEFT adapts a module at the first of its names, and here it is the same at all: its files do not say which."""
    names = {}
    for path, module in inner(model).named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    for first, *others in names.values():
        if others and first in targets:
            raise ValueError(
                f"target {first} is {others[0]}, too; a file's target must have one name"
            )


def _saved(found: dict[str, nn.Module], config: Config) -> dict[str, SavedModule]:
    saved = {}
    for path, module in found.items():
        if (
            not path
            or not config.saves(path)
            or any(path.startswith(f"{outer}.") for outer in saved)
        ):
            continue
        if any(isinstance(m, AdaptedLayer | NF4Linear) for m in module.modules()):
            raise ValueError(
                f"modules_to_save takes in {path}, which has adapters or 4-bit weights; it must be plain"
            )
        saved[path] = module if isinstance(module, SavedModule) else SavedModule(module)
    return saved


def install(model: nn.Module, name: str, config: Config, found: Plan) -> None:
    """Adds the adapter to the plan's wrappers, freezes the model and puts them in. A selection ends here."""
    before = dict(parts(model))
    for path, layer in found.targets.items():
        config.add(layer, name, path)
    for module in found.saved.values():
        module.add(name)
    for module in found.biases.values():
        if ORIGINAL_BIAS not in module._parameters:
            module.register_parameter(ORIGINAL_BIAS, module.bias)
        module.register_parameter(
            f"bias_of_{name}", nn.Parameter(module._parameters[ORIGINAL_BIAS].detach().clone())
        )
    model.requires_grad_(False)  # after all that can fail
    replace_modules(
        model, {id(before[p]): new for p, new in {**found.targets, **found.saved}.items()}
    )
    shared_input.link(inner(model), LoRALinear)
    known = adapters_of(model)
    inner(model)._pyfast_adapters = Adapters({**known.configs, name: config}, known.active)


def switch(model: nn.Module, name: str | None) -> None:
    """Makes the adapter the one that runs, and the only one that trains."""
    for _, module in parts(model):
        if isinstance(module, AdaptedLayer):
            module.set_adapter(name if name in module.adapters else None)
            module.adapters.requires_grad_(False)
        elif isinstance(module, SavedModule):
            module.active = name
            module.copies.requires_grad_(False)
        elif ORIGINAL_BIAS in module._parameters:
            module.bias.requires_grad_(False)
            module.bias = module._parameters.get(
                f"bias_of_{name}", module._parameters[ORIGINAL_BIAS]
            )
    adapters_of(model).active = name
    if name is not None:
        for tensor in entries(model, name).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(tensor.is_floating_point())


def remove(model: nn.Module, name: str) -> None:
    """Takes an adapter out, and the wrappers that held no other."""
    known = adapters_of(model)
    if known.active == name:
        switch(model, None)
    plain = {}
    for _, module in parts(model):
        if isinstance(module, AdaptedLayer) and name in module.adapters:
            module.remove(name)
            plain |= {} if module.adapters else {id(module): module.base}
        elif isinstance(module, SavedModule) and name in module.copies:
            del module.copies[name]
            plain |= {} if module.copies else {id(module): module.base}
        module._parameters.pop(f"bias_of_{name}", None)
        if not any(key.startswith("bias_of_") for key in module._parameters):
            module._parameters.pop(ORIGINAL_BIAS, None)
    replace_modules(model, plain)
    del known.configs[name]


def unwrap(model: nn.Module) -> None:
    """What runs now, without wrappers."""
    plain = {}
    for _, module in parts(model):
        if isinstance(module, AdaptedLayer):
            layer = module.base if isinstance(module, AdapterLinear) else module
            plain[id(module)] = layer.settle() if isinstance(layer, LoRALinear) else layer
        elif isinstance(module, SavedModule):
            plain[id(module)] = module.current(module.active)
        for key in [
            key for key in module._parameters if key == ORIGINAL_BIAS or key.startswith("bias_of_")
        ]:
            del module._parameters[key]
    replace_modules(model, plain)
    inner(model).__dict__.pop("_pyfast_adapters", None)


def entries(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, themselves, by their names in its file without PEFT's prefix."""
    found = {}
    for path, module in parts(model):
        if isinstance(module, AdaptedLayer) and name in module.adapters:
            found |= {
                f"{path}.{key}": tensor for key, tensor in module.adapters[name].entries().items()
            }
        elif isinstance(module, SavedModule) and name in module.copies:
            state = module.copies[name].state_dict(keep_vars=True)
            found |= {f"{path}.{key}": tensor for key, tensor in state.items()}
        elif f"bias_of_{name}" in module._parameters:
            found[f"{path}.bias"] = module._parameters[f"bias_of_{name}"]
    return found


def expected(found: Plan, config: Config) -> tuple[dict[str, tuple], set[str]]:
    """The shapes of `entries` once the plan is in place; and what PEFT writes beside them, which says nothing more."""
    shapes, beside = {}, set()
    for path, layer in found.targets.items():
        shapes |= {f"{path}.{key}": shape for key, shape in config.shapes(layer, path).items()}
    for path, module in found.saved.items():
        state = module.base.state_dict()
        shapes |= {f"{path}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
        if config.bias == "all":
            beside |= {
                f"{path}.{copy}.{key}"
                for copy in ("original_module", "modules_to_save")
                for key in state
            }
    for path, module in found.biases.items():
        shapes[f"{path}.bias" if path else "bias"] = tuple(module.bias.shape)
    return shapes, beside
