"""Installing adapters in a model: planning, adding, switching, removing, and their tensors."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from pyfast.adapters import model_state
from pyfast.adapters.adapter_host import AdapterHost
from pyfast.adapters.bottleneck.layer import BottleneckLinear
from pyfast.adapters.lora import shared_input
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.model_state import AdapterState, Config, adapter_state, walk_original_modules
from pyfast.adapters.module_tree import replace_modules, unwrap_model
from pyfast.adapters.trained_copies import TrainedCopies
from pyfast.nn.nf4_linear import NF4Linear

ORIGINAL_BIAS = "original_bias"  # parameter of a module whose `bias` an adapter has a copy of
_BIAS_COPY = "bias_of_"  # beginning of the parameters' names that hold the copies


class Plan(NamedTuple):
    """Changes of an adapter to a model, by name. The new wrappers are not in the model yet."""

    targets: dict[str, AdapterHost]
    saved: dict[str, TrainedCopies]
    biases: dict[str, nn.Module]


def plan(model: nn.Module, name: str, config: Config) -> Plan:
    """Return what the adapter changes; raise any error before anything is changed."""
    model_state.check_new(model, name)
    modules = dict(walk_original_modules(model))
    hosts = {
        path: module
        for path, module in walk_original_modules(model)
        if isinstance(module, config.layer_type)
    }
    targets = {}
    for path, module in config.find_targets(unwrap_model(model), modules).items():
        layer = hosts[path] if path in hosts else config.layer_type(module)
        try:
            config.check_add(layer, name, path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        targets[path] = layer
    saved = _plan_copies(modules, config)
    for path in targets:
        if any(path == saved_path or path.startswith(f"{saved_path}.") for saved_path in saved):
            raise ValueError(
                f"modules_to_save takes in {path}, which is a target, too; it must be one of the "
                "two"
            )
    biases = _plan_biases(modules, {*targets, *saved}) if config.bias == "all" else {}
    return Plan(targets, saved, biases)


def check_unique_names(model: nn.Module, targets: Collection[str]) -> None:
    """Raise ValueError if a target has several names in the model.

    PEFT adapts a module at the first of its names, pyfast at all of them, and PEFT's files do not
    say which.
    """
    paths_of = {}
    for path, module in unwrap_model(model).named_modules(remove_duplicate=False):
        paths_of.setdefault(id(module), []).append(path)
    for first, *others in paths_of.values():
        if others and first in targets:
            raise ValueError(
                f"target {first} is {others[0]}, too; a file's target must have one name"
            )


def install(model: nn.Module, name: str, config: Config, plan: Plan) -> None:
    """Add the adapter to the plan's wrappers, freeze the model and insert the wrappers.

    This ends a selection.
    """
    originals = dict(walk_original_modules(model))
    for path, layer in plan.targets.items():
        config.add(layer, name, path)
    for module in plan.saved.values():
        module.add(name)
    for module in plan.biases.values():
        if ORIGINAL_BIAS not in module._parameters:
            module.register_parameter(ORIGINAL_BIAS, module.bias)
        bias = module._parameters[ORIGINAL_BIAS].detach().clone()
        module.register_parameter(_BIAS_COPY + name, nn.Parameter(bias))
    model.requires_grad_(False)  # after all that can fail
    wrappers = {**plan.targets, **plan.saved}
    replace_modules(model, {id(originals[path]): new for path, new in wrappers.items()})
    state = adapter_state(model)
    model_state.set_adapter_state(
        model, AdapterState({**state.configs, name: config}, state.active)
    )
    _link_shared_inputs(model)


def switch(model: nn.Module, name: str | None) -> None:
    """Make the adapter the one that runs, and the only one that trains."""
    for _, module in walk_original_modules(model):
        if isinstance(module, AdapterHost):
            module.set_adapter(name if name in module.adapters else None)
            module.adapters.requires_grad_(False)
        elif isinstance(module, TrainedCopies):
            module.active = name
            module.copies.requires_grad_(False)
        elif ORIGINAL_BIAS in module._parameters:
            module.bias.requires_grad_(False)
            original = module._parameters[ORIGINAL_BIAS]
            module.bias = module._parameters.get(f"{_BIAS_COPY}{name}", original)
    adapter_state(model).active = name
    if name is not None:
        for tensor in adapter_tensors(model, name).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(tensor.is_floating_point())


def remove(model: nn.Module, name: str) -> None:
    """Remove an adapter, and the wrappers that held no other."""
    state = adapter_state(model)
    if state.active == name:
        switch(model, None)
    shared_input.unlink(unwrap_model(model), LoRALinear)
    originals = {}
    for _, module in walk_original_modules(model):
        if isinstance(module, AdapterHost) and name in module.adapters:
            module.remove(name)
            if not module.adapters:
                originals[id(module)] = module.base
        elif isinstance(module, TrainedCopies) and name in module.copies:
            del module.copies[name]
            if not module.copies:
                originals[id(module)] = module.base
        module._parameters.pop(_BIAS_COPY + name, None)
        if not any(_bias_copies(module)):
            module._parameters.pop(ORIGINAL_BIAS, None)
    replace_modules(model, originals)
    del state.configs[name]
    _link_shared_inputs(model)


def remove_wrappers(model: nn.Module) -> None:
    """Keep what runs now, and remove all wrappers for good."""
    shared_input.unlink(unwrap_model(model), LoRALinear)
    plain = {}
    for _, module in walk_original_modules(model):
        if isinstance(module, AdapterHost):
            layer = module.base if isinstance(module, BottleneckLinear) else module
            plain[id(module)] = layer.release_base() if isinstance(layer, LoRALinear) else layer
        elif isinstance(module, TrainedCopies):
            plain[id(module)] = module.module_for(module.active)
        for key in list(_bias_copies(module)):
            del module._parameters[key]
        module._parameters.pop(ORIGINAL_BIAS, None)
    replace_modules(model, plain)
    model_state.set_adapter_state(model, None)


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the adapter's tensors (not copies), keyed as in PEFT's file without its prefix."""
    tensors = {}
    for path, module in walk_original_modules(model):
        if isinstance(module, AdapterHost) and name in module.adapters:
            for key, tensor in module.adapters[name].tensors_by_key().items():
                tensors[f"{path}.{key}"] = tensor
        elif isinstance(module, TrainedCopies) and name in module.copies:
            for key, tensor in module.copies[name].state_dict(keep_vars=True).items():
                tensors[f"{path}.{key}"] = tensor
        elif _BIAS_COPY + name in module._parameters:
            tensors[f"{path}.bias"] = module._parameters[_BIAS_COPY + name]
    return tensors


def expected_shapes(plan: Plan, config: Config) -> tuple[dict[str, tuple], set[str]]:
    """Return the shapes of `adapter_tensors` after the plan, and the keys of redundant tensors.

    PEFT writes the latter beside the others; they say nothing more.
    """
    shapes, redundant = {}, set()
    for path, layer in plan.targets.items():
        for key, shape in config.tensor_shapes(layer, path).items():
            shapes[f"{path}.{key}"] = shape
    for path, module in plan.saved.items():
        for key, tensor in module.base.state_dict().items():
            shapes[f"{path}.{key}"] = tuple(tensor.shape)
            if config.bias == "all":
                redundant |= {f"{path}.original_module.{key}", f"{path}.modules_to_save.{key}"}
    for path, module in plan.biases.items():
        shapes[f"{path}.bias" if path else "bias"] = tuple(module.bias.shape)
    return shapes, redundant


def _plan_copies(modules: dict[str, nn.Module], config: Config) -> dict[str, TrainedCopies]:
    """Return the wrappers of the modules to save; modules inside others are saved with these."""
    saved = {}
    for path, module in modules.items():
        is_inside = any(path.startswith(f"{saved_path}.") for saved_path in saved)
        if not path or is_inside or not config.is_saved(path):
            continue
        if any(isinstance(m, AdapterHost | NF4Linear) for m in module.modules()):
            raise ValueError(
                f"modules_to_save takes in {path}, which has adapters or 4-bit weights; it must "
                "be plain"
            )
        saved[path] = module if isinstance(module, TrainedCopies) else TrainedCopies(module)
    return saved


def _plan_biases(modules: dict[str, nn.Module], wrapped: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules that have a bias and are not wrapped."""
    biases = {}
    for path, module in modules.items():
        if path in wrapped:
            continue
        if isinstance(module, AdapterHost | TrainedCopies):
            raise ValueError(
                f"bias is 'all', but {path} is another adapter's; it must be 'none' or 'lora_only'"
            )
        if module._parameters.get("bias") is not None:
            biases[path] = module
    return biases


def _bias_copies(module: nn.Module) -> Iterator[str]:
    return (key for key in module._parameters if key.startswith(_BIAS_COPY))


def _link_shared_inputs(model: nn.Module) -> None:
    configs = adapter_state(model).configs
    names = {name for name, config in configs.items() if config.share_inputs}
    shared_input.link(unwrap_model(model), LoRALinear, names)
