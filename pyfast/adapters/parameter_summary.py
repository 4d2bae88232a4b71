"""Counting a model's parameters: how many there are, how many train, and their memory."""

from typing import NamedTuple

from torch import nn

from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.lora.shared_input import sharing_devices
from pyfast.adapters.lora.weights import LoRAWeights
from pyfast.adapters.trained_copies import TrainedCopies
from pyfast.nn.adapter import Adapter
from pyfast.nn.nf4_linear import NF4Linear

FOUR_BIT = "4-bit"


class Counts(NamedTuple):
    """Numbers of parameters. A 4-bit weight counts as the weight that it stands for."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.3g} %)"


class Summary(Counts):
    """The numbers of all parameters, and of each group of them.

    Attributes:
        kinds: Counts of each group: "dense", "4-bit", "LoRA", "bottleneck", "modules to save".
        sizes: bytes of each group.
        shared_inputs: names of layers that share a pass over their input, and how many groups of
            layers are called so.
    """

    kinds: dict[str, Counts]
    sizes: dict[str, int]
    shared_inputs: dict[tuple[str, ...], int]

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.sizes.values())

    @property
    def table(self) -> str:
        """A line for each group, one for all, and one for shared inputs where there are any."""
        rows = [(name, counts, self.sizes[name]) for name, counts in self.kinds.items()]
        lines = [f"{'':16} {'train':>14} {'of':>16} {'MB':>10}"]
        for name, counts, size in [*rows, ("all", self, self.bytes)]:
            lines.append(f"{name:16} {counts.trainable:14,} {counts.total:16,} {size / 1e6:10,.1f}")
        if self.shared_inputs:
            lines.append(self._sharing())
        return "\n".join(lines)

    def __str__(self) -> str:
        sharing = f"; {self._sharing()}" if self.shared_inputs else ""
        return super().__str__() + sharing

    def _sharing(self) -> str:
        groups = [f"{n} x ({', '.join(names)})" for names, n in self.shared_inputs.items()]
        return f"one pass over their input on {sharing_devices()}: {', '.join(groups)}"


def summary(model: nn.Module) -> Summary:
    """Count the model's parameters, how many of them train, and their bytes.

    Args:
        model: any module.

    Returns:
        A pair (trainable, total). `kinds` holds the same for each group of parameters, `sizes`
        their bytes, and `table` all of it as text. Layers that share a pass over their input have
        a line of their own there.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
        >>> summary = pyfast.summary(pyfast.add_lora(model, pyfast.LoRAConfig(r=4)))
        >>> print(summary)
        672 of 3,304 parameters train (20.3 %)
        >>> summary.kinds["LoRA"].trainable, summary.bytes
        (672, 13216)
    """
    groups, weight_sizes = group_parameters(model)
    kinds, sizes = {}, {}
    for p in model.parameters():
        group, size = groups.get(id(p), "dense"), weight_sizes.get(id(p), p.numel())
        trainable, total = kinds.get(group, (0, 0))
        kinds[group] = Counts(trainable + size * p.requires_grad, total + size)
        sizes[group] = sizes.get(group, 0) + p.nbytes
    trainable = sum(counts.trainable for counts in kinds.values())
    result = Summary(trainable, sum(counts.total for counts in kinds.values()))
    result.kinds, result.sizes, result.shared_inputs = kinds, sizes, _shared_inputs(model)
    return result


def group_parameters(model: nn.Module) -> tuple[dict[int, str], dict[int, int]]:
    """Return the group of each parameter that is not a dense one, and the size of 4-bit weights.

    Both are keyed by the parameter's id. The size is that of the weight that the 4 bits stand for.
    """
    groups, weight_sizes = {}, {}
    for module in model.modules():
        if isinstance(module, NF4Linear):
            for key, p in module.named_parameters(recurse=False):
                if key != "bias":
                    size = module.out_features * module.in_features if key == "weight" else 0
                    groups[id(p)], weight_sizes[id(p)] = FOUR_BIT, size
        elif isinstance(module, LoRAWeights):
            groups |= {id(p): "LoRA" for p in module.parameters()}
        elif isinstance(module, Adapter):
            groups |= {id(p): "bottleneck" for p in module.parameters()}
        elif isinstance(module, TrainedCopies):
            groups |= {id(p): "modules to save" for p in module.copies.parameters()}
    return groups, weight_sizes


def _shared_inputs(model: nn.Module) -> dict[tuple[str, ...], int]:
    """Return the names of layers whose active adapter shares their input, with their numbers."""
    groups = {}
    for module in model.modules():
        shared_input = module.shared_input if isinstance(module, LoRALinear) else None
        if shared_input is not None and shared_input.partners(module):
            groups[id(shared_input)] = tuple(shared_input.sharing_layers())
    numbers = {}
    for names in groups.values():
        numbers[names] = numbers.get(names, 0) + 1
    return numbers
