"""The adapters of a model: which modules they change, putting them in and out, and their tensors by PEFT's names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from pyfast.lora_config import LoRAConfig, targets_of
from pyfast.lora_layer import LoRALinear
from pyfast.lora_weights import check_name
from pyfast.nf4 import NF4Linear
from pyfast.saved_module import SavedModule

ORIGINAL_BIAS = "original_bias"  # beside `bias`, where an adapter has its own, `bias_of_<adapter>`


@dataclass
class Adapters:
    """What a model knows of its adapters."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    active: str | None = None


class Plan(NamedTuple):
    """What an adapter changes, by name, in a model that has not been touched yet."""

    targets: dict[str, LoRALinear]  # new ones are not in the model
    saved: dict[str, SavedModule]  # likewise
    biases: dict[str, nn.Module]


def inner(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, parallel) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model


def adapters_of(model: nn.Module) -> Adapters:
    return inner(model).__dict__.get("_lora_adapters", Adapters())


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by their names before any adapter was added: nothing inside the wrappers."""
    inside = None
    for name, module in list(inner(model).named_modules()):
        if inside is not None and name.startswith(inside):
            continue
        yield name, module
        if isinstance(module, LoRALinear | SavedModule):
            inside = f"{name}." if name else ""


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in parts(model) if isinstance(module, LoRALinear)}


def check_unmerged(model: nn.Module, what: str) -> None:
    for layer in lora_layers(model).values():
        layer.check_unmerged(what)


def check_new(model: nn.Module, name: str) -> None:
    """Whether another adapter of this name can be added."""
    check_name(name)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model is a DistributedDataParallel, which takes no new parameters; it must be the one inside")
    if name in adapters_of(model).configs:
        raise ValueError(f"name is {name!r}, which the model has already; it must be new")
    check_unmerged(model, "a new adapter")


def plan(model: nn.Module, name: str, config: LoRAConfig) -> Plan:
    """All that could be wrong with a new adapter is said here, before anything is changed."""
    check_new(model, name)
    found = dict(parts(model))
    targets = {}
    for path, module in targets_of(inner(model), config, found).items():
        layer = module if isinstance(module, LoRALinear) else LoRALinear(module)
        options = {"dropout": config.dropout, "init": config.init, "dtype": config.dtype}
        try:
            layer.check_add(name, config.rank_of(path), config.alpha_of(path), **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        targets[path] = layer
    saved = _saved(found, config)
    for path in targets:
        if any(path == outer or path.startswith(f"{outer}.") for outer in saved):
            raise ValueError(f"modules_to_save takes in {path}, which is a target, too; it must be one of the two")
    biases = {}
    if config.bias == "all":
        biases = {p: m for p, m in found.items() if p not in saved and m._parameters.get("bias") is not None}
        biases = {p: m for p, m in biases.items() if p not in targets}
        others = [
            p for p, m in found.items() if isinstance(m, LoRALinear | SavedModule) and p not in {**targets, **saved}
        ]
        if others:
            raise ValueError(f"bias is 'all', but {others[0]} is another adapter's; it must be 'none' or 'lora_only'")
    return Plan(targets, saved, biases)


def check_apart(model: nn.Module, targets: Iterable[str]) -> None:
    """PEFT adapts a module at the first of its names, and here it is the same at all: its files do not say which."""
    names = {}
    for path, module in inner(model).named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    for first, *others in names.values():
        if others and first in targets:
            raise ValueError(f"target {first} is {others[0]}, too; a file's target must have one name")


def _saved(found: dict[str, nn.Module], config: LoRAConfig) -> dict[str, SavedModule]:
    saved = {}
    for path, module in found.items():
        if not path or not config.saves(path) or any(path.startswith(f"{outer}.") for outer in saved):
            continue
        if any(isinstance(m, LoRALinear | NF4Linear) for m in module.modules()):
            raise ValueError(f"modules_to_save takes in {path}, which has adapters or 4-bit weights; it must be plain")
        saved[path] = module if isinstance(module, SavedModule) else SavedModule(module)
    return saved


def install(model: nn.Module, name: str, config: LoRAConfig, found: Plan) -> None:
    """Adds the adapter to the plan's wrappers, freezes the model and puts them in."""
    before = dict(parts(model))
    for path, layer in found.targets.items():
        layer.add(
            name,
            config.rank_of(path),
            config.alpha_of(path),
            dropout=config.dropout,
            rslora=config.rslora,
            dora=config.dora,
            lora_bias=config.lora_bias,
            bias=config.bias != "none",
            init=config.init,
            dtype=config.dtype,
        )
    for module in found.saved.values():
        module.add(name)
    for module in found.biases.values():
        if ORIGINAL_BIAS not in module._parameters:
            module.register_parameter(ORIGINAL_BIAS, module.bias)
        module.register_parameter(f"bias_of_{name}", nn.Parameter(module._parameters[ORIGINAL_BIAS].detach().clone()))
    model.requires_grad_(False)  # after all that can fail
    replace_modules(model, {id(before[p]): new for p, new in {**found.targets, **found.saved}.items()})
    known = adapters_of(model)
    inner(model)._lora_adapters = Adapters({**known.configs, name: config}, known.active)


def replace_modules(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Puts modules in the place of others, given by id, wherever those are."""
    for parent in list(model.modules()):
        if id(parent) not in {id(module) for module in new.values()}:
            for child_name, child in list(parent._modules.items()):
                if id(child) in new and new[id(child)] is not child:
                    setattr(parent, child_name, new[id(child)])
                    if isinstance(parent, nn.TransformerEncoderLayer):
                        parent.activation_relu_or_gelu = 0  # or torch reads the weights in eval, past the layers


def switch(model: nn.Module, name: str | None) -> None:
    """Makes the adapter the one that runs, and the only one that trains."""
    for _, module in parts(model):
        if isinstance(module, LoRALinear):
            module.set_adapter(name if name in module.adapters else None)
            module.adapters.requires_grad_(False)
        elif isinstance(module, SavedModule):
            module.active = name
            module.copies.requires_grad_(False)
        elif ORIGINAL_BIAS in module._parameters:
            module.bias.requires_grad_(False)
            module.bias = module._parameters.get(f"bias_of_{name}", module._parameters[ORIGINAL_BIAS])
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
        if isinstance(module, LoRALinear) and name in module.adapters:
            module.remove(name)
            plain |= {} if module.adapters else {id(module): module.settle()}
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
        if isinstance(module, LoRALinear):
            plain[id(module)] = module.settle()
        elif isinstance(module, SavedModule):
            plain[id(module)] = module.current(module.active)
        for key in [key for key in module._parameters if key == ORIGINAL_BIAS or key.startswith("bias_of_")]:
            del module._parameters[key]
    replace_modules(model, plain)
    inner(model).__dict__.pop("_lora_adapters", None)


def entries(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, themselves, by PEFT's names without its prefix."""
    found = {}
    for path, module in parts(model):
        if isinstance(module, LoRALinear) and name in module.adapters:
            for key, attribute in _KEYS.items():
                tensor = getattr(module.adapters[name], attribute)
                if tensor is not None:
                    found[f"{path}.{key}"] = tensor
        elif isinstance(module, SavedModule) and name in module.copies:
            state = module.copies[name].state_dict(keep_vars=True)
            found |= {f"{path}.{key}": tensor for key, tensor in state.items()}
        elif f"bias_of_{name}" in module._parameters:
            found[f"{path}.bias"] = module._parameters[f"bias_of_{name}"]
    return found


def expected(found: Plan, config: LoRAConfig) -> tuple[dict[str, tuple], set[str]]:
    """The shapes of `entries` once the plan is in place; and what PEFT writes beside them, which says nothing more."""
    shapes, beside = {}, set()
    for path, layer in found.targets.items():
        r, out, own = config.rank_of(path), layer.out_features, f"{path}."
        shapes |= {f"{own}lora_A.weight": (r, layer.in_features), f"{own}lora_B.weight": (out, r)}
        has_bias = config.bias != "none" and layer.bias is not None
        vectors = {"lora_B.bias": config.lora_bias, "lora_magnitude_vector": config.dora, "base_layer.bias": has_bias}
        shapes |= {own + key: (out,) for key, there in vectors.items() if there}
    for path, module in found.saved.items():
        state = module.base.state_dict()
        shapes |= {f"{path}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
        if config.bias == "all":
            beside |= {f"{path}.{copy}.{key}" for copy in ("original_module", "modules_to_save") for key in state}
    for path, module in found.biases.items():
        shapes[f"{path}.bias" if path else "bias"] = tuple(module.bias.shape)
    return shapes, beside


_KEYS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
    "base_layer.bias": "bias",
}
