"""AdapterConfig: after which layers of a model a bottleneck adapter comes, and what it is made of."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import nn

from pyfast import reference
from pyfast._support import config_rules
from pyfast.adapters import module_names
from pyfast.adapters.bottleneck.layer import AdapterLinear
from pyfast.adapters.lora.config import check_targets

# The last layers of the two branches whose outputs a transformer adds to its stream, by the ends of
# their names.
_ATTENTION = (
    r"(cross)?attention\.output\.dense",  # BERT and those like it
    r"(self_attn|attention)\.(o_proj|out_proj|dense)",  # Llama and those like it, ViT; BART, OPT, CLIP; GPT-NeoX, Phi
    r"encoder_attn\.out_proj",
    r"(attn|crossattention)\.c_proj",  # GPT-2
    r"(SelfAttention|EncDecAttention)\.o",  # T5
    r"attention\.out_lin",  # DistilBERT
    r"attn\.Wo",  # ModernBERT
)
_FEED_FORWARD = (
    r"(?<!attention\.)output\.dense",
    r"mlp\.(down_proj|fc2|c_proj|dense_4h_to_h)",
    r"layers\.\d+\.fc2",  # BART, OPT
    r"DenseReluDense\.wo",
    r"ffn\.lin2",
    r"mlp\.Wo",
)
STYLES = {
    "houlsby": {"attention": _ATTENTION, "feed-forward": _FEED_FORWARD},
    "pfeiffer": {"feed-forward": _FEED_FORWARD},
}


@dataclass(frozen=True)
class AdapterConfig:
    """The bottleneck adapters of a model, each inside a branch, before the residual is added.

    Args:
        bottleneck: hidden values of each. style: "houlsby" has one after attention and one after
        the feed-forward of each layer, "pfeiffer" only the
            latter. The places are known in transformers' usual models.
        targets: for any other model, or other places: the linear layers that adapters come after,
        as a list of last
            parts of names or a regular expression for whole names.
        activation: "relu", "gelu" (by erf), "gelu_tanh", "silu" or "tanh". scaling: of what the
        adapter adds. dropout: of the adapters' input, in training. modules_to_save: ends of names
        of modules that the adapter has a fully trained copy of, such as a new head. dtype: of the
        adapters; float32 by default.
    """

    bottleneck: int = 64
    style: str = "houlsby"
    targets: str | Sequence[str] | None = None
    activation: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    modules_to_save: Sequence[str] = ()
    dtype: torch.dtype | None = None
    layer: ClassVar[type] = AdapterLinear
    bias: ClassVar[str] = "none"  # of the model's, an adapter has none of its own

    def __post_init__(self) -> None:
        config_rules.check(self, _RULES)
        if isinstance(self.targets, str):
            module_names.check_regex("targets", self.targets)
        for name in ("bottleneck", "scaling", "dropout"):
            object.__setattr__(self, name, config_rules.plain(getattr(self, name)))

    def __hash__(self) -> int:
        return hash(
            (self.bottleneck, self.style, self.activation, self.scaling, self.dropout, self.dtype)
        )

    def check_all_match(self, targets: Iterable[str], saved: Iterable[str]) -> None:
        """No module to save that is nowhere."""
        module_names.check_saved(self.modules_to_save, saved)

    def targets_of(
        self, model: nn.Module, modules: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """The layers that adapters come after, by name; `modules` are the candidates."""
        if self.targets is not None:
            chosen = {
                name: module
                for name, module in modules.items()
                if name and module_names.is_named(name, self.targets)
            }
            check_targets(self.targets, chosen, modules)
            return chosen
        known = {kind: _at(places, modules) for kind, places in STYLES[self.style].items()}
        for kind, found in known.items():
            if not found:
                raise ValueError(
                    f"style is {self.style!r}, but no layer of {type(model).__name__} is known to end its {kind}; "
                    f"targets must name the layers that adapters come after"
                )
        chosen = {
            name: module
            for name, module in modules.items()
            if any(name in found for found in known.values())
        }
        check_targets(self.style, chosen, modules)
        return chosen

    def check_add(self, layer: AdapterLinear, name: str, path: str) -> None:
        """All that `add` could refuse, with nothing changed."""
        layer.check_add(name, self.dtype)

    def add(self, layer: AdapterLinear, name: str, path: str) -> None:
        """The adapter after the layer."""
        options = {"activation": self.activation, "scaling": self.scaling, "dropout": self.dropout}
        layer.add(name, self.bottleneck, dtype=self.dtype, **options)

    def shapes(self, layer: AdapterLinear, path: str) -> dict[str, tuple]:
        """Of the tensors that `add` makes, by their names in a file."""
        b, width = self.bottleneck, layer.out_features
        matrices = {"adapter_down.weight": (b, width), "adapter_up.weight": (width, b)}
        return matrices | {"adapter_down.bias": (b,), "adapter_up.bias": (width,)}

    def saves(self, name: str) -> bool:
        """Whether this is the name of a module that the adapter has its own copy of."""
        return any(name.endswith(end) for end in self.modules_to_save)


def _at(places: Iterable[str], modules: Mapping[str, nn.Module]) -> set[str]:
    ends = re.compile(rf"(.*\.)?({'|'.join(places)})")
    return {name for name in modules if ends.fullmatch(name)}


_RULES = {
    "bottleneck": (config_rules.is_count, "an integer, 1 or more"),
    "style": (lambda v: v in tuple(STYLES), "'houlsby' or 'pfeiffer'"),
    "targets": (
        lambda v: v is None or config_rules.is_regex_or_names(v),
        "a regex, a list of names or None",
    ),
    "activation": (
        lambda v: v in tuple(reference.ACTIVATIONS),
        f"one of {', '.join(map(repr, reference.ACTIVATIONS))}",
    ),
    "scaling": (config_rules.is_number, "a finite number"),
    "dropout": config_rules.DROPOUT,
    "modules_to_save": config_rules.NAMES,
    "dtype": config_rules.DTYPE,
}
assert _RULES.keys() == {f.name for f in fields(AdapterConfig)}
