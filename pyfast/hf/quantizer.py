"""transformers' quantization method "pyfast_nf4": `from_pretrained(...,
quantization_config=NF4Config())`.

Weights are read from the files one by one and quantized as they come, so that the model is never in
memory in 16 bits. `save_pretrained` writes bitsandbytes' entries; they load again here, and there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyfast._support import notices
from pyfast.formats.bitsandbytes import SUFFIXES, read_bitsandbytes
from pyfast.formats.errors import CheckpointError
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.nn import nf4_linear
from pyfast.nn.linear_layers import HEADS, is_conv1d, is_linear, linear_of
from pyfast.ops import nf4

METHOD = "pyfast_nf4"

# What went wrong with a weight: transformers reports it as a text, and raises another error.
first_error: ContextVar[list[CheckpointError] | None] = ContextVar("first_error", default=None)


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """How a model is quantized, as `nf4_quantize`.

    Args:
        blocksize: values that share a scale. nested: quantize the scales, too. quant_type: "nf4" or
        "fp4". skip: layers to leave as they are, by the ends of their names or regular expressions
        for the beginnings; by
            default the output head. What shares its weight with another module is never quantized.
    """

    def __init__(
        self,
        blocksize: int = 64,
        nested: bool = True,
        quant_type: str = "nf4",
        skip: list[str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        nf4.check_format(blocksize, nested, quant_type)
        if skip is not None and (
            isinstance(skip, str) or not all(isinstance(name, str) for name in skip)
        ):
            raise TypeError(f"skip is {skip!r}; it must be a list of names")
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}; it must be {METHOD!r}")
        self.blocksize, self.nested, self.quant_type = blocksize, nested, quant_type
        self.skip = None if skip is None else list(skip)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """What transformers asks of a quantizer."""

    requires_calibration = False
    serialized_names: ClassVar = {
        "weight": ["weight", *(f"weight.{suffix}" for suffix in SUFFIXES)]
    }

    @property
    def quantized_element_size(self) -> float:
        return (
            0.5 + (1 if self.quantization_config.nested else 4) / self.quantization_config.blocksize
        )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        config = self.quantization_config
        never = self.get_modules_to_not_convert(model, config.skip, model._keep_in_fp32_modules)
        never += [
            key.removesuffix(".weight")
            for pair in model.all_tied_weights_keys.items()
            for key in pair
        ]
        never += (
            [] if config.skip is not None else [head for heads in HEADS.values() for head in heads]
        )
        linear = [name for name, module in model.named_modules() if is_linear(module)]
        self.targets = {name for name in linear if should_convert_module(name, never)}
        stacks = [
            name
            for name, p in model.named_parameters()
            if p.dim() == 3 and not _is_conv(model, name)
        ]
        if stacks:
            more = f" and {len(stacks) - 1} others" if len(stacks) > 1 else ""
            notices.warn_once(
                f"{stacks[0]}{more} (experts in one tensor) are no linear layers and are not quantized"
            )
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict:
        return {"deserialize": _Read}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        # Nothing to undo when the model is saved: its entries are already the file's.
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            c for c in used if not any(isinstance(o, _Read) for o in _operations(c))
        ]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nf4_linear.NF4Linear):
                weight = nf4.nf4_dequantize(layer.nf4_weight, dtype)
                model.set_submodule(name, linear_of(weight, layer.bias).train(layer.training))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """So that Trainer takes a model with adapters of `add_lora`, which it does not know."""
        return True


def _is_conv(model: nn.Module, key: str) -> bool:
    return isinstance(model.get_submodule(key.rpartition(".")[0]), nn.modules.conv._ConvNd)


def _operations(conversion: object) -> list[ConversionOps]:
    return getattr(conversion, "operations", [])


@contextmanager
def _told(key: str) -> Iterator[None]:
    """What is wrong with a weight is told with its name, and kept for who asked."""
    try:
        yield
    except (ValueError, TypeError) as error:
        told = CheckpointError(f"{key}: {error}")
        if (errors := first_error.get()) is not None:
            errors.append(told)
        raise told from None


class _Op(ConversionOps):
    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def _put(self, model: nn.Module, key: str, w: NF4Weight, missing_keys: set[str]) -> None:
        """An NF4Linear in the place of the layer that `key` is the weight of."""
        path = key.rpartition(".")[0]
        old = model.get_submodule(path)
        shape = tuple(old.weight.shape[::-1] if is_conv1d(old) else old.weight.shape)
        if w.shape != shape:
            raise CheckpointError(f"it is of shape {list(w.shape)}; the model's is {list(shape)}")
        new = nf4_linear.NF4Linear.from_weight(w, old.bias).train(old.training)
        for parameter in (p for p in new.parameters() if p is not new.bias):
            parameter._is_hf_initialized = True  # or transformers would draw it anew
        model.set_submodule(path, new)
        missing_keys.discard(key)


class _Quantize(_Op):
    @torch.no_grad()
    def convert(
        self, input_dict: dict, *, model: nn.Module, missing_keys: set[str], **kwargs
    ) -> dict[str, Tensor]:
        """The layer is replaced, and so nothing left to set."""
        config = self.hf_quantizer.quantization_config
        for key, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            value = value.t() if is_conv1d(model.get_submodule(key.rpartition(".")[0])) else value
            options = {
                "blocksize": config.blocksize,
                "nested": config.nested,
                "quant_type": config.quant_type,
            }
            with _told(key):
                self._put(model, key, nf4.nf4_quantize(value, **options), missing_keys)
        return {}


class _Read(_Op):
    def convert(
        self,
        input_dict: dict,
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **kwargs,
    ) -> dict[str, Tensor]:
        """The layer is replaced; a weight that is not quantized goes on as it is."""
        entries = {
            key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        if len(entries) == 1 and entries["weight"].is_floating_point():
            return input_dict
        with _told(full_layer_name):
            w = read_bitsandbytes(entries, "weight")
            self._put(model, full_layer_name, w, missing_keys)
        return {}
