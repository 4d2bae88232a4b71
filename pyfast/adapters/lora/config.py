"""LoRAConfig: which layers of a model get an adapter, and of what kind. Names match by PEFT's rules."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import ClassVar

import torch
from torch import nn

from pyfast._support import config_rules
from pyfast.adapters import module_names
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.lora.weights import INITS
from pyfast.adapters.trained_copies import SavedModule
from pyfast.nn.linear_layers import ALL_LINEAR, BASES, HEADS, hint_for, is_linear, looks_linear

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """The adapters of a model.

    Args:
        r: rank of A and B. alpha: the update is scaled by alpha / r, or with `rslora` by alpha /
        sqrt(r). targets: "all-linear" (but the output head), a list of last parts of layers' names,
        or a regular expression
            for whole names.
        exclude: as `targets`; what is not to be changed. dropout: of the adapters' input, in
        training. dora: W + s B A keeps its direction and gets a trained magnitude for each row.
        With dropout, in training, only
            the low-rank half sees the x it thinned out; PEFT's correction by the norm does, too.
            Without, both are one.
        lora_bias: B has a bias. bias: which biases of the model the adapter has its own trained
        copies of: "none", "all" or "lora_only". init: "kaiming", "gaussian", "orthogonal" or
        "pissa". rank_pattern: other ranks, by a regular expression for the last parts of names; the
        first match counts. alpha_pattern: other alphas, likewise. modules_to_save: ends of names of
        modules that the adapter has a fully trained copy of. layers_to_transform: numbers of the
        layers to change, with `targets` a list. layers_pattern: name of the list of layers that
        those number. dtype: of the adapters; float32 by default. task_type: PEFT's, e.g.
        "CAUSAL_LM"; "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" save the head, too.
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
    layer: ClassVar[type] = LoRALinear

    def __post_init__(self) -> None:
        config_rules.check(self, _RULES)
        for name in ("targets", "exclude", "layers_pattern"):
            if isinstance(getattr(self, name), str):
                module_names.check_regex(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
            for pattern in getattr(self, name):
                module_names.check_regex(name, pattern)
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
        for name in (
            "r",
            "alpha",
            "dropout",
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
        ):
            object.__setattr__(self, name, config_rules.plain(getattr(self, name)))
        heads = [name for name in HEADS.get(self.task_type, ()) if name not in self.modules_to_save]
        object.__setattr__(self, "modules_to_save", [*self.modules_to_save, *heads])

    def __hash__(self) -> int:
        return hash(
            (self.r, self.alpha, self.dropout, self.init, self.bias, self.dtype, self.task_type)
        )

    def rank_of(self, name: str) -> int:
        """The rank for the layer of this name."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """The alpha for the layer of this name."""
        return _first_match(self.alpha_pattern, name, self.alpha)

    def matches(self, name: str) -> bool:
        """Whether this is the name of a target; "all-linear" takes every name."""
        if self._excluded(name):
            return False
        if isinstance(self.targets, str):
            return (
                self.targets.lower() == ALL_LINEAR or re.fullmatch(self.targets, name) is not None
            )
        if name in self.targets:
            return True
        return any(name.endswith(f".{target}") for target in self.targets) and self._in_layers(name)

    def check_all_match(self, targets: Iterable[str], saved: Iterable[str]) -> None:
        """No pattern and no module to save that is nowhere, but for the heads that come with the task."""
        for field_name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field_name):
                if not any(_first_match({key: True}, name, False) for name in targets):
                    raise ValueError(f"{field_name} holds {key!r}, which matches no target")
        heads = HEADS.get(self.task_type, ())
        module_names.check_saved([end for end in self.modules_to_save if end not in heads], saved)

    def targets_of(
        self, model: nn.Module, modules: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """The modules to adapt, by name; `modules` are the candidates."""
        chosen = {name: module for name, module in modules.items() if name and self.matches(name)}
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            head = _head(model, self)
            chosen = {name: module for name, module in chosen.items() if module is not head}
            _check_all_can_be_adapted(chosen)
            chosen = {name: module for name, module in chosen.items() if is_adaptable(module)}
        check_targets(self.targets, chosen, modules)
        return chosen

    def check_add(self, layer: LoRALinear, name: str, path: str) -> None:
        """All that `add` could refuse, with nothing changed."""
        options = {"dropout": self.dropout, "init": self.init, "dtype": self.dtype}
        layer.check_add(name, self.rank_of(path), self.alpha_of(path), **options)

    def add(self, layer: LoRALinear, name: str, path: str) -> None:
        """The adapter of the layer that the model knows by `path`."""
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

    def shapes(self, layer: LoRALinear, path: str) -> dict[str, tuple]:
        """Of the tensors that `add` makes, by PEFT's names."""
        r, out = self.rank_of(path), layer.out_features
        has_bias = self.bias != "none" and layer.bias is not None
        vectors = {
            "lora_B.bias": self.lora_bias,
            "lora_magnitude_vector": self.dora,
            "base_layer.bias": has_bias,
        }
        matrices = {"lora_A.weight": (r, layer.in_features), "lora_B.weight": (out, r)}
        return matrices | {key: (out,) for key, there in vectors.items() if there}

    def saves(self, name: str) -> bool:
        """Whether this is the name of a module that the adapter has its own copy of."""
        return any(name.endswith(end) for end in self.modules_to_save)

    def _excluded(self, name: str) -> bool:
        if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in self.modules_to_save):
            return True
        return module_names.is_named(name, self.exclude)

    def _in_layers(self, name: str) -> bool:
        """Whether the first number in the name is that of a layer to transform."""
        wanted = (
            [self.layers_to_transform]
            if isinstance(self.layers_to_transform, int)
            else self.layers_to_transform
        )
        if not wanted:
            return True
        patterns = (
            [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        )
        starts = [rf"(?:^|.*?\.){p}\." for p in patterns] if patterns else [r".*?\.[^.]*\."]
        found = next(filter(None, (re.match(rf"{start}(\d+)\.", name) for start in starts)), None)
        return found is not None and int(found[1]) in wanted


def _check_all_can_be_adapted(modules: Mapping[str, nn.Module]) -> None:
    """No layer is left out in silence."""
    others = {
        name: module
        for name, module in modules.items()
        if looks_linear(module) and not is_adaptable(module)
    }
    if others:
        module = next(iter(others.values()))
        names = ", ".join([*list(others)[:4], *(["..."] if len(others) > 4 else [])])
        raise TypeError(
            f"targets is 'all-linear', but {names} ({type(module).__name__}) cannot be adapted; each must be {BASES}, "
            f"or in exclude{hint_for(module)}"
        )


def check_targets(
    wanted: object, chosen: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> None:
    """Some, and linear layers all."""
    if not chosen:
        ends = sorted({n.rpartition(".")[2] for n, m in modules.items() if is_adaptable(m)})
        raise ValueError(
            f"targets {wanted!r} match no layer; the model's linear layers are called {ends}"
        )
    for name, module in chosen.items():
        if isinstance(module, SavedModule) or not is_adaptable(module):
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}; it must be a linear layer"
            )


def is_adaptable(module: nn.Module) -> bool:
    """A linear layer, perhaps with adapters or trained copies already."""
    module = module.base if isinstance(module, SavedModule) else module
    return isinstance(module, LoRALinear) or is_linear(module)


def _head(model: nn.Module, config: LoRAConfig) -> nn.Module | None:
    """The output layer, by transformers' conventions."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is None and callable(ask) and config.task_type == "SEQ_CLS":
        head = next(
            (getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None
        )
    return head


def _first_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default
    )


def _is_index(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


_RULES = {
    "r": (config_rules.is_count, "an integer, 1 or more"),
    "alpha": (config_rules.is_number, "a finite number"),
    "targets": (config_rules.is_regex_or_names, "'all-linear', a regex or a list of names"),
    "exclude": (
        lambda v: isinstance(v, str) or config_rules.is_names(v),
        "a regex or a list of names",
    ),
    "dropout": config_rules.DROPOUT,
    "dora": config_rules.FLAG,
    "rslora": config_rules.FLAG,
    "lora_bias": config_rules.FLAG,
    "bias": (lambda v: v in BIASES, "'none', 'all' or 'lora_only'"),
    "init": (lambda v: v in (*INITS, "pissa"), "'kaiming', 'gaussian', 'orthogonal' or 'pissa'"),
    "rank_pattern": (
        lambda v: (
            isinstance(v, Mapping)
            and config_rules.is_names(list(v))
            and all(map(config_rules.is_count, v.values()))
        ),
        "a dict of names and integers, 1 or more",
    ),
    "alpha_pattern": (
        lambda v: (
            isinstance(v, Mapping)
            and config_rules.is_names(list(v))
            and all(map(config_rules.is_number, v.values()))
        ),
        "a dict of names and finite numbers",
    ),
    "modules_to_save": config_rules.NAMES,
    "layers_to_transform": (
        lambda v: (
            v is None or _is_index(v) or (isinstance(v, list | tuple) and all(map(_is_index, v)))
        ),
        "a layer's number or a list of them",
    ),
    "layers_pattern": (
        lambda v: v is None or isinstance(v, str) or config_rules.is_names(v),
        "a name or a list of names",
    ),
    "dtype": config_rules.DTYPE,
    "task_type": (lambda v: v is None or isinstance(v, str), "a string or None"),
}
assert _RULES.keys() == {f.name for f in fields(LoRAConfig)}
