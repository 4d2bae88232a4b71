"""A pretrained model and its adapters: LoRA or bottlenecks added, switched, mixed, removed, merged."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pyfast._support import checks
from pyfast.adapters import installation
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.lora.layer import MERGED_INTO
from pyfast.adapters.mixed_batch import RowWrapper
from pyfast.nn.nf4_linear import NF4Linear


def add_lora(
    model: nn.Module, config: LoRAConfig | None = None, name: str = "default"
) -> nn.Module:
    """Freezes the model and gives its target layers an adapter, which is active and all that
    trains. In place.

    A second adapter is added the same way, under another name.
    """
    return _add(model, LoRAConfig() if config is None else config, LoRAConfig, name)


def add_adapters(
    model: nn.Module, config: AdapterConfig | None = None, name: str = "default"
) -> nn.Module:
    """`add_lora` for bottleneck adapters. One model may have both kinds, under different names."""
    return _add(model, AdapterConfig() if config is None else config, AdapterConfig, name)


def _add(model: nn.Module, config: installation.Config, kind: type, name: str) -> nn.Module:
    checks.instance("model", model, nn.Module)
    checks.instance("config", config, kind)
    plan = installation.plan(model, name, config)
    config.check_all_match(plan.targets, plan.saved)
    installation.install(model, name, config, plan)
    installation.switch(model, name)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switches to an adapter, or with None to the model as it was. The active one trains, no other does."""
    installation.check_known(model, name)
    installation.check_unmerged(model, "set_adapter")
    installation.switch(model, name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter out of the model; if it was the active one, none is."""
    installation.check_known(model, name)
    installation.check_unmerged(model, "remove_adapter")
    installation.remove(model, name)


@contextmanager
def mixed_batch(model: nn.Module, adapter_ids: Sequence[str | None]) -> Iterator[None]:
    """Within it, row i of every batch runs with the adapter of the i-th name; None is the model as
    it was.

    With checkpoints (activations computed again in the backward), the backward belongs inside it,
    too. A model that torch.compile has compiled is compiled once for each set of adapters in a
    batch, in whatever order the rows are; with bottleneck adapters or modules_to_save, for each
    order.
    """
    for name in adapter_ids:
        installation.check_known(model, name)
        if name is not None and installation.adapters_of(model).configs[name].bias == "all":
            raise ValueError(
                f"adapter {name!r} has its own biases all over the model; it cannot share a batch"
            )
    wrappers = [module for _, module in installation.parts(model) if isinstance(module, RowWrapper)]
    before, may_train = [module.rows for module in wrappers], torch.is_grad_enabled()
    try:
        for module in wrappers:
            module.rows = module.rows_of(adapter_ids)
        yield
    finally:
        for module, rows in zip(wrappers, before, strict=True):
            module.rows, module.rows_left = rows, module.rows_left or may_train


def merge(model: nn.Module, into: str = "16bit", *, unwrap: bool = False) -> dict[str, float]:
    """Folds the active adapter into the layers; says what of each one's update was lost, as
    `LoRALinear.merge` does.

    `into` is for NF4 layers: "16bit" makes them dense, "nf4" quantizes the sum. With `unwrap` the
    model becomes a plain one, without adapters, for good; otherwise `unmerge` brings all back, to
    the bit.
    """
    active = installation.adapters_of(model).active
    if isinstance(installation.adapters_of(model).configs.get(active), AdapterConfig):
        raise ValueError(
            f"adapter {active!r} is a bottleneck, which no weight can hold; merge is for LoRA"
        )
    layers = {
        name: layer
        for name, layer in installation.lora_layers(model).items()
        if layer.active is not None
    }
    if not layers:
        raise ValueError("model has no active adapter; add_lora or set_adapter comes before merge")
    installation.check_unmerged(model, "merge")
    checks.one_of("into", into, MERGED_INTO)
    nf4 = [name for name, layer in layers.items() if isinstance(layer.base, NF4Linear)]
    if into == "nf4" and not nf4:
        raise ValueError("into is 'nf4' but no adapted layer is an NF4Linear; it must be '16bit'")
    lost = {}
    for name, layer in layers.items():
        lost[name] = layer.fold(into if name in nf4 else "16bit")
        if unwrap:
            layer.settle()  # here, or both bases of every layer are in memory at the end
    if into == "nf4" and any(lost[name] for name in nf4):
        mean, worst = sum(lost[name] for name in nf4) / len(nf4), max(nf4, key=lost.get)
        which = f"{mean:.0%} of the update on average, {lost[worst]:.0%} in {worst}"
        warnings.warn(f"merging into NF4 lost {which} (||error|| / ||update||)", stacklevel=2)
    if unwrap:
        installation.unwrap(model)
    return lost


def unmerge(model: nn.Module) -> None:
    """The model as it was before `merge`, to the bit."""
    merged = [layer for layer in installation.lora_layers(model).values() if layer.merged]
    if not merged:
        raise ValueError("nothing is merged into model")
    for layer in merged:
        layer.unmerge()
