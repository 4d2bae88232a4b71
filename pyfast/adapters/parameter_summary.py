"""How many parameters a model has, of which kind, how many train, and what memory they take."""

from typing import NamedTuple

from torch import nn

from pyfast.adapters.lora.weights import LoRAWeights
from pyfast.adapters.trained_copies import SavedModule
from pyfast.nn.adapter import Adapter
from pyfast.nn.nf4_linear import NF4Linear

FOUR_BIT = "4-bit"


class Counts(NamedTuple):
    """Numbers of parameters; a 4-bit weight counts as what it stands for."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.3g} %)"


class Summary(Counts):
    """All together; by kind in `kinds`, with bytes in `sizes`, and as text in `table`."""

    kinds: dict[str, Counts]
    sizes: dict[str, int]

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return sum(self.sizes.values())

    @property
    def table(self) -> str:
        """A line for each kind, and one for all."""
        rows = [(kind, counts, self.sizes[kind]) for kind, counts in self.kinds.items()]
        lines = [f"{'':16} {'train':>14} {'of':>16} {'MB':>10}"]
        for kind, counts, size in [*rows, ("all", self, self.bytes)]:
            lines.append(f"{kind:16} {counts.trainable:14,} {counts.total:16,} {size / 1e6:10,.1f}")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """How many parameters the model has, and how many of them train."""
    kinds, stands_for = kinds_of(model)
    counts, sizes = {}, {}
    for p in model.parameters():
        kind, n = kinds.get(id(p), "dense"), stands_for.get(id(p), p.numel())
        trainable, total = counts.get(kind, (0, 0))
        counts[kind] = Counts(trainable + n * p.requires_grad, total + n)
        sizes[kind] = sizes.get(kind, 0) + p.nbytes
    found = Summary(
        sum(c.trainable for c in counts.values()), sum(c.total for c in counts.values())
    )
    found.kinds, found.sizes = counts, sizes
    return found


def kinds_of(model: nn.Module) -> tuple[dict[int, str], dict[int, int]]:
    """By id, the kind of the parameters that are not dense ones, and what those in 4 bits stand for."""
    kinds, stands_for = {}, {}
    for module in model.modules():
        if isinstance(module, NF4Linear):
            for key, p in module.named_parameters(recurse=False):
                if key != "bias":
                    kinds[id(p)] = FOUR_BIT
                    stands_for[id(p)] = (
                        module.out_features * module.in_features if key == "weight" else 0
                    )
        elif isinstance(module, LoRAWeights):
            kinds |= {id(p): "LoRA" for p in module.parameters()}
        elif isinstance(module, Adapter):
            kinds |= {id(p): "bottleneck" for p in module.parameters()}
        elif isinstance(module, SavedModule):
            kinds |= {id(p): "modules to save" for p in module.copies.parameters()}
    return kinds, stands_for
