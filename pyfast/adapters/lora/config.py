"""LoRAConfig: which layers of a model get a LoRA adapter, and how it is made.

Names of layers match by PEFT's rules.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import ClassVar

import torch
from torch import nn

from pyfast._support import config_rules
from pyfast.adapters import module_names
from pyfast.adapters.lora.initialization import INITS
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.target_layers import (
    check_all_adaptable,
    check_targets,
    is_adaptable,
    output_head,
)
from pyfast.nn.linear_layers import ALL_LINEAR, TASK_HEADS

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """The options of a LoRA adapter.

    Args:
        r: rank of A and B.
        alpha: the update is scaled by alpha / r.
        targets: the layers to adapt: "all-linear" (all but the output head), a list of last parts
            of layers' names, or a regular expression for whole names.
        exclude: layers to leave out; a list or a regular expression as in `targets`.
        dropout: probability of zeroing an element of the adapter's input, in training.
        dora: keep the direction of W + s B A and train a magnitude for each row. With dropout, in
            training, only the low-rank half sees the dropped x; PEFT's correction by the norm
            does, too. Without dropout the two are the same.
        rslora: scale the update by alpha / sqrt(r).
        lora_bias: train a bias of B.
        bias: biases of the model that the adapter trains copies of: "none", "all" or "lora_only".
        init: "kaiming", "gaussian", "orthogonal" or "pissa"; see `LoRALinear.add`.
        rank_pattern: other ranks, keyed by regular expressions for the last parts of names. The
            first match counts.
        alpha_pattern: other alphas, keyed as in `rank_pattern`.
        modules_to_save: ends of names of modules that the adapter trains a full copy of.
        layers_to_transform: numbers of the transformer layers to adapt; `targets` must be a list.
        layers_pattern: name of the list that `layers_to_transform` counts in.
        dtype: dtype of the adapter's parameters; None is float32, or float64 for a float64 base.
        task_type: PEFT's task type, e.g. "CAUSAL_LM". "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS"
            also train and save the head.
        share_inputs: compute layers that have one input (q, k, v; gate, up) in one pass over it,
            on CUDA. On an H200, where whole models ran in CUDA graphs, this saved 3 and 5 % of
            the device's time and 16 to 21 % of the host's launching. On a CPU the layers always
            run one by one, since sharing gains nothing there (factors of 0.995 and 0.999). Layers
            with dropout in training, with hooks or under torch.compile run one by one, too. The
            option is not written to files.

    Raises:
        ValueError: if an option has another value than described, or two do not go together.

    Example:
        >>> import torch, pyfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
        >>> config = pyfast.LoRAConfig(r=4, alpha=8, targets=["0"], dora=True)
        >>> model = pyfast.add_lora(model, config)
        >>> print(pyfast.summary(model))
        448 of 3,080 parameters train (14.5 %)
    """

    r: int = 16
    alpha: float = 32
    targets: str | Sequence[str] = ALL_LINEAR
    exclude: str | Sequence[str] = ()
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    init: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    dtype: torch.dtype | None = None
    task_type: str | None = None
    share_inputs: bool = False
    layer_type: ClassVar[type] = LoRALinear

    def __post_init__(self) -> None:
        config_rules.check(self, _RULES)
        _check_patterns(self)
        if self.layers_to_transform is not None and isinstance(self.targets, str):
            raise ValueError(
                "layers_to_transform is set, and targets is a string; it must be a list of names"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern is set, and layers_to_transform is not; it must say which layers"
            )
        if self.dora and self.lora_bias:
            raise ValueError("lora_bias is True, and so is dora; PEFT's files do not hold both")
        for name in _NUMBERS:
            object.__setattr__(self, name, config_rules.plain(getattr(self, name)))
        modules_to_save = list(self.modules_to_save)
        heads = TASK_HEADS.get(self.task_type, ())
        modules_to_save += [name for name in heads if name not in modules_to_save]
        object.__setattr__(self, "modules_to_save", modules_to_save)

    def __hash__(self) -> int:
        return hash(
            (self.r, self.alpha, self.dropout, self.init, self.bias, self.dtype, self.task_type)
        )

    def rank_of(self, name: str) -> int:
        """Return the rank for the layer of this name."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """Return the alpha for the layer of this name."""
        return _first_match(self.alpha_pattern, name, self.alpha)

    def matches(self, name: str) -> bool:
        """Return whether this is the name of a target; "all-linear" takes every name."""
        if self._is_excluded(name):
            return False
        if isinstance(self.targets, str):
            return self._targets_all() or re.fullmatch(self.targets, name) is not None
        if name in self.targets:
            return True
        is_target = any(name.endswith(f".{target}") for target in self.targets)
        return is_target and self._is_in_layers(name)

    def check_all_match(self, targets: Iterable[str], saved: Iterable[str]) -> None:
        """Raise ValueError if a pattern or a module to save matches nothing.

        The heads that come with the task may be missing.
        """
        for field_name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field_name):
                if not any(_first_match({key: True}, name, False) for name in targets):
                    raise ValueError(f"{field_name} holds {key!r}, which matches no target")
        heads = TASK_HEADS.get(self.task_type, ())
        name_ends = [name_end for name_end in self.modules_to_save if name_end not in heads]
        module_names.check_modules_to_save(name_ends, saved)

    def find_targets(
        self, model: nn.Module, modules: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """Return the layers to adapt, by name; `modules` are all modules of the model."""
        targets = {name: module for name, module in modules.items() if name and self.matches(name)}
        if self._targets_all():
            head = output_head(model, self.task_type)
            targets = {name: module for name, module in targets.items() if module is not head}
            check_all_adaptable(targets)
            targets = {name: module for name, module in targets.items() if is_adaptable(module)}
        check_targets(self.targets, targets, modules)
        return targets

    def check_add(self, layer: LoRALinear, name: str, path: str) -> None:
        """Raise the error that `add` would raise, and change nothing."""
        options = {"dropout": self.dropout, "init": self.init, "dtype": self.dtype}
        layer.check_add(name, self.rank_of(path), self.alpha_of(path), **options)

    def add(self, layer: LoRALinear, name: str, path: str) -> None:
        """Add the adapter to the layer that is called `path` in the model."""
        layer.add(
            name,
            self.rank_of(path),
            self.alpha_of(path),
            dropout=self.dropout,
            rslora=self.rslora,
            dora=self.dora,
            lora_bias=self.lora_bias,
            bias=self.bias != "none",
            init=self.init,
            dtype=self.dtype,
        )

    def tensor_shapes(self, layer: LoRALinear, path: str) -> dict[str, tuple]:
        """Return the shapes of the tensors that `add` makes, keyed as in PEFT's files."""
        r, out_features = self.rank_of(path), layer.out_features
        has_bias = self.bias != "none" and layer.bias is not None
        vectors = {
            "lora_B.bias": self.lora_bias,
            "lora_magnitude_vector": self.dora,
            "base_layer.bias": has_bias,
        }
        shapes = {"lora_A.weight": (r, layer.in_features), "lora_B.weight": (out_features, r)}
        return shapes | {key: (out_features,) for key, is_used in vectors.items() if is_used}

    def is_saved(self, name: str) -> bool:
        """Return whether the adapter trains a full copy of the module of this name."""
        return any(name.endswith(name_end) for name_end in self.modules_to_save)

    def _targets_all(self) -> bool:
        return isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR

    def _is_excluded(self, name: str) -> bool:
        if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in self.modules_to_save):
            return True
        return module_names.is_named(name, self.exclude)

    def _is_in_layers(self, name: str) -> bool:
        """Return whether the first number in the name is one of `layers_to_transform`."""
        numbers, patterns = self.layers_to_transform, self.layers_pattern
        numbers = [numbers] if isinstance(numbers, int) else numbers
        if not numbers:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        prefixes = [rf"(?:^|.*?\.){p}\." for p in patterns] if patterns else [r".*?\.[^.]*\."]
        for prefix in prefixes:
            if match := re.match(rf"{prefix}(\d+)\.", name):
                return int(match[1]) in numbers
        return False


def _check_patterns(config: LoRAConfig) -> None:
    for name in ("targets", "exclude", "layers_pattern"):
        if isinstance(getattr(config, name), str):
            module_names.check_regex(name, getattr(config, name))
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        for pattern in getattr(config, name):
            module_names.check_regex(name, pattern)


def _first_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    """Return the value of the first pattern that matches the name's last parts."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _is_index(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def _is_index_or_indices(value: object) -> bool:
    return _is_index(value) or (isinstance(value, list | tuple) and all(map(_is_index, value)))


def _is_dict_of(value: object, is_valid) -> bool:
    is_dict = isinstance(value, Mapping) and config_rules.is_names(list(value))
    return is_dict and all(map(is_valid, value.values()))


def _is_regex_or_list(value: object) -> bool:
    return isinstance(value, str) or config_rules.is_names(value)


_NUMBERS = ("r", "alpha", "dropout", "rank_pattern", "alpha_pattern", "layers_to_transform")
_RULES = {
    "r": (config_rules.is_count, "an integer, 1 or more"),
    "alpha": (config_rules.is_number, "a finite number"),
    "targets": (config_rules.is_regex_or_names, "'all-linear', a regex or a list of names"),
    "exclude": (_is_regex_or_list, "a regex or a list of names"),
    "dropout": config_rules.DROPOUT,
    "dora": config_rules.FLAG,
    "rslora": config_rules.FLAG,
    "lora_bias": config_rules.FLAG,
    "bias": (lambda v: v in BIASES, "'none', 'all' or 'lora_only'"),
    "init": (lambda v: v in INITS, "'kaiming', 'gaussian', 'orthogonal' or 'pissa'"),
    "rank_pattern": (
        lambda v: _is_dict_of(v, config_rules.is_count),
        "a dict of names and integers, 1 or more",
    ),
    "alpha_pattern": (
        lambda v: _is_dict_of(v, config_rules.is_number),
        "a dict of names and finite numbers",
    ),
    "modules_to_save": config_rules.NAMES,
    "layers_to_transform": (
        lambda v: v is None or _is_index_or_indices(v),
        "a layer's number or a list of them",
    ),
    "layers_pattern": (
        lambda v: v is None or _is_regex_or_list(v),
        "a name or a list of names",
    ),
    "dtype": config_rules.DTYPE,
    "task_type": (lambda v: v is None or isinstance(v, str), "a string or None"),
    "share_inputs": config_rules.FLAG,
}
assert _RULES.keys() == {f.name for f in fields(LoRAConfig)}
