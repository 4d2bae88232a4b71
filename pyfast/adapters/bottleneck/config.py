"""AdapterConfig: which layers of a model get a bottleneck adapter, and how it is made."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import nn

from pyfast import reference
from pyfast._support import config_rules
from pyfast.adapters import module_names
from pyfast.adapters.bottleneck.layer import BottleneckLinear
from pyfast.adapters.target_layers import check_targets

# Ends of names of the last layers of the two branches that a transformer adds to its stream.
_ATTENTION = (
    r"(cross)?attention\.output\.dense",  # BERT and its relatives
    # Llama and its relatives, ViT; BART, OPT, CLIP; GPT-NeoX, Phi
    r"(self_attn|attention)\.(o_proj|out_proj|dense)",
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
    """The options of a bottleneck adapter.

    Each layer's adapter is inside a branch of the transformer, before the residual is added.

    Args:
        bottleneck: number of hidden values of each layer's adapter.
        style: "houlsby" adapts the end of attention and the end of the feed-forward of each
            transformer layer, "pfeiffer" only the latter. These layers are known in transformers'
            usual models.
        targets: for any other model, or other layers: the linear layers that adapters follow, as
            a list of last parts of names or as a regular expression for whole names.
        activation: "relu", "gelu" (by erf), "gelu_tanh", "silu" or "tanh".
        scaling: factor of what the adapter adds.
        dropout: probability of zeroing an element of the adapter's input, in training.
        modules_to_save: ends of names of modules that the adapter trains a full copy of, such as
            a new head.
        dtype: dtype of the adapter's parameters; None is float32, or float64 for a float64 base.

    Raises:
        ValueError: if an option has another value than described.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
        >>> config = pyfast.AdapterConfig(bottleneck=4, targets=["0"], activation="gelu")
        >>> model = pyfast.add_adapters(model, config)
        >>> print(pyfast.summary(model))
        580 of 3,212 parameters train (18.1 %)
    """

    bottleneck: int = 64
    style: str = "houlsby"
    targets: str | Sequence[str] | None = None
    activation: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    modules_to_save: Sequence[str] = ()
    dtype: torch.dtype | None = None
    layer_type: ClassVar[type] = BottleneckLinear
    bias: ClassVar[str] = "none"  # the adapter trains no biases of the model
    share_inputs: ClassVar[bool] = False

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
        """Raise ValueError if a module to save matches nothing."""
        module_names.check_modules_to_save(self.modules_to_save, saved)

    def find_targets(
        self, model: nn.Module, modules: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """Return the layers that adapters follow, by name; `modules` are all of the model."""
        if self.targets is not None:
            targets = {
                name: module
                for name, module in modules.items()
                if name and module_names.is_named(name, self.targets)
            }
            check_targets(self.targets, targets, modules)
            return targets
        names = set()
        for branch, name_ends in STYLES[self.style].items():
            branch_names = _names_ending_in(name_ends, modules)
            if not branch_names:
                raise ValueError(
                    f"style is {self.style!r}, but no layer of {type(model).__name__} is known "
                    f"to end its {branch}; "
                    f"targets must name the layers that adapters come after"
                )
            names |= branch_names
        targets = {name: module for name, module in modules.items() if name in names}
        check_targets(self.style, targets, modules)
        return targets

    def check_add(self, layer: BottleneckLinear, name: str, path: str) -> None:
        """Raise the error that `add` would raise, and change nothing."""
        layer.check_add(name, self.dtype)

    def add(self, layer: BottleneckLinear, name: str, path: str) -> None:
        """Add the adapter to the layer that is called `path` in the model."""
        options = {"activation": self.activation, "scaling": self.scaling, "dropout": self.dropout}
        layer.add(name, self.bottleneck, dtype=self.dtype, **options)

    def tensor_shapes(self, layer: BottleneckLinear, path: str) -> dict[str, tuple]:
        """Return the shapes of the tensors that `add` makes, keyed as in adapter files."""
        bottleneck, width = self.bottleneck, layer.out_features
        return {
            "adapter_down.weight": (bottleneck, width),
            "adapter_up.weight": (width, bottleneck),
            "adapter_down.bias": (bottleneck,),
            "adapter_up.bias": (width,),
        }

    def is_saved(self, name: str) -> bool:
        """Return whether the adapter trains a full copy of the module of this name."""
        return any(name.endswith(name_end) for name_end in self.modules_to_save)


def _names_ending_in(name_ends: Iterable[str], names: Iterable[str]) -> set[str]:
    pattern = re.compile(rf"(.*\.)?({'|'.join(name_ends)})")
    return {name for name in names if pattern.fullmatch(name)}


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
