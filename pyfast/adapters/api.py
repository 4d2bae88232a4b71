"""Adapters of a pretrained model: added, switched, mixed in a batch, removed and merged."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pyfast._support import checks
from pyfast.adapters import installation, model_state
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.lora.merging import MERGE_FORMATS
from pyfast.adapters.row_assignment import RowAssignable
from pyfast.nn.nf4_linear import NF4Linear


def add_lora(
    model: nn.Module, config: LoRAConfig | None = None, name: str = "default"
) -> nn.Module:
    """Freeze the model, in place, and add a LoRA adapter, which is active and alone trains.

    A second adapter is added in the same way, under another name.

    Args:
        model: any module with linear layers.
        config: which layers are adapted and how; `LoRAConfig()` by default.
        name: name of the adapter, new in the model.

    Returns:
        The model.

    Raises:
        ValueError: if the name is taken, or the config does not fit the model; nothing is changed.
        TypeError: if a target is not a linear layer, or an argument is of another class.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
        >>> model = pyfast.add_lora(model, pyfast.LoRAConfig(r=4), "german")
        >>> model(torch.randn(2, 32)).sum().backward()
        >>> sorted(name for name, p in model.named_parameters() if p.grad is not None)[:2]
        ['0.adapters.german.lora_a', '0.adapters.german.lora_b']
    """
    return _add(model, LoRAConfig() if config is None else config, LoRAConfig, name)


def add_adapters(
    model: nn.Module, config: AdapterConfig | None = None, name: str = "default"
) -> nn.Module:
    """Freeze the model, in place, and add a bottleneck adapter, which is active and alone trains.

    A model may have bottleneck and LoRA adapters, under different names.

    Args:
        model: one of transformers' usual models, or any module with `config.targets`.
        config: which layers are adapted and how; `AdapterConfig()` by default.
        name: name of the adapter, new in the model.

    Returns:
        The model.

    Raises:
        ValueError: if the name is taken, or the config does not fit the model; nothing is changed.
        TypeError: if a target is not a linear layer, or an argument is of another class.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
        >>> config = pyfast.AdapterConfig(bottleneck=4, targets=["0"])
        >>> model = pyfast.add_adapters(model, config)
        >>> model(torch.randn(2, 32)).shape
        torch.Size([2, 8])
    """
    return _add(model, AdapterConfig() if config is None else config, AdapterConfig, name)


def _add(model: nn.Module, config: model_state.Config, config_type: type, name: str) -> nn.Module:
    checks.instance("model", model, nn.Module)
    checks.instance("config", config, config_type)
    plan = installation.plan(model, name, config)
    config.check_all_match(plan.targets, plan.saved)
    installation.install(model, name, config, plan)
    installation.switch(model, name)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Activate an adapter, in place: it runs, and it alone trains.

    Args:
        model: a model with adapters.
        name: the adapter's name, or None for the model without adapters.

    Raises:
        ValueError: if the model has no adapter of this name.
        RuntimeError: if an adapter is merged.

    Example:
        >>> import torch, pyfast
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(32, 8)), torch.randn(2, 32)
        >>> y = model(x)
        >>> model = pyfast.add_lora(model, pyfast.LoRAConfig(init="orthogonal"), "german")
        >>> pyfast.set_adapter(model, None)
        >>> torch.equal(model(x), y)
        True
    """
    model_state.check_known(model, name)
    model_state.check_unmerged(model, "set_adapter")
    installation.switch(model, name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter from the model, in place; if it was the active one, none is active.

    Args:
        model: a model with adapters.
        name: the adapter's name.

    Raises:
        ValueError: if the model has no adapter of this name.
        RuntimeError: if an adapter is merged.

    Example:
        >>> import torch, pyfast
        >>> model = pyfast.add_lora(torch.nn.Sequential(torch.nn.Linear(32, 8)), name="german")
        >>> pyfast.remove_adapter(model, "german")
        >>> model
        Sequential(
          (0): Linear(in_features=32, out_features=8, bias=True)
        )
    """
    model_state.check_known(model, name)
    model_state.check_unmerged(model, "remove_adapter")
    installation.remove(model, name)


@contextmanager
def mixed_batch(model: nn.Module, adapter_ids: Sequence[str | None]) -> Iterator[None]:
    """Run row i of every batch with the i-th adapter, inside a `with` block.

    With activation checkpoints, which recompute layers in the backward, the backward belongs
    inside the block, too. torch.compile compiles a model once for each set of adapters in a batch,
    in whatever order the rows are. With bottleneck adapters or `modules_to_save` it compiles once
    for each order.

    Args:
        model: a model with adapters.
        adapter_ids: an adapter's name for each row, None for the model without adapters.

    Raises:
        ValueError: if a name is unknown, or its adapter was made with `bias="all"`.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 8))
        >>> for name in ("german", "french"):
        ...     model = pyfast.add_lora(model, pyfast.LoRAConfig(r=4), name)
        >>> with pyfast.mixed_batch(model, ["german", None, "french", "german"]):
        ...     y = model(torch.randn(4, 32))
        >>> y.shape
        torch.Size([4, 8])
    """
    for name in adapter_ids:
        model_state.check_known(model, name)
        if name is not None and model_state.adapter_state(model).configs[name].bias == "all":
            raise ValueError(
                f"adapter {name!r} has its own biases all over the model; it cannot share a batch"
            )
    modules = [module for _, module in model_state.walk_original_modules(model)]
    modules = [module for module in modules if isinstance(module, RowAssignable)]
    rows_before, may_train = [module.rows for module in modules], torch.is_grad_enabled()
    try:
        for module in modules:
            module.rows = module.assign_rows(adapter_ids)
        yield
    finally:
        for module, rows in zip(modules, rows_before, strict=True):
            module.rows, module.has_left_batch = rows, module.has_left_batch or may_train


def merge(model: nn.Module, into: str = "16bit", *, unwrap: bool = False) -> dict[str, float]:
    """Fold the active LoRA adapter into the layers, in place, and warn of what NF4 loses.

    Args:
        model: a model whose active adapter is a LoRA adapter.
        into: format of NF4 layers after the merge: "16bit" makes them dense, "nf4" quantizes the
            sum. Dense layers keep their dtype.
        unwrap: make the model a plain one, without adapters, for good. Otherwise `unmerge` brings
            all back, to the bit.

    Returns:
        The share of the update that each layer lost, by the layer's name; see `LoRALinear.merge`.

    Raises:
        ValueError: if no LoRA adapter is active, or `into` does not fit the layers.
        RuntimeError: if an adapter is merged already.

    Example:
        >>> import torch, pyfast
        >>> model = pyfast.add_lora(torch.nn.Sequential(torch.nn.Linear(32, 8)))
        >>> pyfast.merge(model, unwrap=True)
        {'0': 0.0}
        >>> model
        Sequential(
          (0): Linear(in_features=32, out_features=8, bias=True)
        )
    """
    state = model_state.adapter_state(model)
    if isinstance(state.configs.get(state.active), AdapterConfig):
        raise ValueError(
            f"adapter {state.active!r} is a bottleneck, which no weight can hold; merge is for LoRA"
        )
    layers = {n: layer for n, layer in model_state.lora_layers(model).items() if layer.active}
    if not layers:
        raise ValueError("model has no active adapter; add_lora or set_adapter comes before merge")
    model_state.check_unmerged(model, "merge")
    checks.one_of("into", into, MERGE_FORMATS)
    nf4_names = [name for name, layer in layers.items() if isinstance(layer.base, NF4Linear)]
    if into == "nf4" and not nf4_names:
        raise ValueError("into is 'nf4' but no adapted layer is an NF4Linear; it must be '16bit'")
    lost = {}
    for name, layer in layers.items():
        lost[name] = layer.merge_without_warning(into if name in nf4_names else "16bit")
        if unwrap:
            layer.release_base()  # now, or both bases of every layer are in memory at the end
    if into == "nf4":
        _warn_of_loss({name: lost[name] for name in nf4_names})
    if unwrap:
        installation.remove_wrappers(model)
    return lost


def _warn_of_loss(lost: dict[str, float]) -> None:
    """Warn of the update that layers lost in NF4, if any did."""
    if any(lost.values()):
        mean, worst = sum(lost.values()) / len(lost), max(lost, key=lost.get)
        losses = f"{mean:.0%} of the update on average, {lost[worst]:.0%} in {worst}"
        warnings.warn(f"merging into NF4 lost {losses} (||error|| / ||update||)", stacklevel=3)


def unmerge(model: nn.Module) -> None:
    """Restore the model as it was before `merge`, in place and to the bit.

    Args:
        model: a model with a merged adapter.

    Raises:
        ValueError: if nothing is merged.

    Example:
        >>> import torch, pyfast
        >>> model = pyfast.add_lora(torch.nn.Sequential(torch.nn.Linear(32, 8)))
        >>> lost = pyfast.merge(model)
        >>> pyfast.unmerge(model)
        >>> model[0].merged
        False
    """
    merged = [layer for layer in model_state.lora_layers(model).values() if layer.merged]
    if not merged:
        raise ValueError("nothing is merged into model")
    for layer in merged:
        layer.unmerge()
