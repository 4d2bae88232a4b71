"""The quantization method "pyfast_nf4" of transformers.

`from_pretrained(..., quantization_config=NF4Config())` uses it. Weights are read from the files one
by one and quantized as they come, so that the model is never in memory in 16 bits.
`save_pretrained` writes bitsandbytes' entries, which pyfast and bitsandbytes load.
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
from pyfast.nn.linear_layers import TASK_HEADS, is_conv1d, is_linear, make_linear
from pyfast.ops import nf4

METHOD = "pyfast_nf4"

# Errors of weights while a model is loaded: transformers makes text of them and raises another
# error.
load_errors: ContextVar[list[CheckpointError] | None] = ContextVar("load_errors", default=None)


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """Settings of the quantization "pyfast_nf4", for from_pretrained and `load_quantized`.

    Args:
        blocksize: how many values share a scale; a power of two from 32 to 4096 (default: 64).
        nested: quantize the scales, too (default: True).
        quant_type: "nf4" or "fp4" (default: "nf4").
        skip: layers that stay as they are. Each entry is the end of a name, or a regular expression
            for its beginning. Default: the output head. Layers that share their weight with another
            module are never quantized.
        quant_method: must be "pyfast_nf4"; files that were saved with the method hold it.

    Raises:
        TypeError, ValueError: if an argument is not one of these.

    Example:
        >>> import tempfile, transformers, pyfast.hf
        >>> settings = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=64)
        >>> config = pyfast.hf.NF4Config(blocksize=32, skip=["lm_head", "c_proj"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     transformers.GPT2LMHeadModel(settings).save_pretrained(directory)
        ...     model = pyfast.hf.load_quantized(directory, config=config)
        >>> type(model.transformer.h[0].mlp.c_proj).__name__
        'Conv1D'
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
    """Quantizer of transformers for the method "pyfast_nf4"."""

    requires_calibration = False
    serialized_names: ClassVar = {
        "weight": ["weight", *(f"weight.{suffix}" for suffix in SUFFIXES)]
    }

    @property
    def quantized_element_size(self) -> float:
        """Bytes that a quantized value takes: half a byte and its part of the scale."""
        scale_bytes = 1 if self.quantization_config.nested else 4
        return 0.5 + scale_bytes / self.quantization_config.blocksize

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        """Choose the layers to quantize, and warn about experts that are no layers."""
        config = self.quantization_config
        skipped = self.get_modules_to_not_convert(model, config.skip, model._keep_in_fp32_modules)
        for pair in model.all_tied_weights_keys.items():
            skipped += [key.removesuffix(".weight") for key in pair]
        if config.skip is None:
            for heads in TASK_HEADS.values():
                skipped += heads
        linear = [name for name, module in model.named_modules() if is_linear(module)]
        self.targets = {name for name in linear if should_convert_module(name, skipped)}
        stacks = [name for name, p in model.named_parameters() if p.dim() == 3]
        stacks = [name for name in stacks if not _is_conv(model, name)]
        if stacks:
            more = f" and {len(stacks) - 1} others" if len(stacks) > 1 else ""
            notices.warn_once(
                f"{stacks[0]}{more} (experts in one tensor) are no linear layers and are not "
                "quantized"
            )
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        """Return whether the parameter is the weight of a layer to quantize."""
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict:
        return {"deserialize": _Read}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        """Drop the conversions by _Read: saving would undo them, but the entries are the file's."""
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _has_read(c)]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace every NF4Linear by an nn.Linear, in place."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nf4_linear.NF4Linear):
                weight = nf4.nf4_dequantize(layer.nf4_weight, dtype)
                model.set_submodule(name, make_linear(weight, layer.bias).train(layer.training))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that Trainer accepts a model with adapters of `add_lora`, unknown to it."""
        return True


def _is_conv(model: nn.Module, key: str) -> bool:
    return isinstance(model.get_submodule(key.rpartition(".")[0]), nn.modules.conv._ConvNd)


def _has_read(conversion: object) -> bool:
    return any(isinstance(op, _Read) for op in getattr(conversion, "operations", []))


@contextmanager
def _name_in_errors(key: str) -> Iterator[None]:
    """Raise errors as CheckpointErrors with the weight's name, and note them in `load_errors`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        named_error = CheckpointError(f"{key}: {error}")
        if (errors := load_errors.get()) is not None:
            errors.append(named_error)
        raise named_error from None


class _ReplaceLayer(ConversionOps):
    """Conversion that leaves no tensor to set, because it replaces the layer of the weight."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def _replace(self, model: nn.Module, key: str, w: NF4Weight, missing_keys: set[str]) -> None:
        """Put an NF4Linear in the place of the layer whose weight is `key`."""
        path = key.rpartition(".")[0]
        old = model.get_submodule(path)
        shape = tuple(old.weight.shape[::-1] if is_conv1d(old) else old.weight.shape)
        if w.shape != shape:
            raise CheckpointError(f"it is of shape {list(w.shape)}; the model's is {list(shape)}")
        new = nf4_linear.NF4Linear.from_weight(w, old.bias).train(old.training)
        for parameter in new.parameters():
            if parameter is not new.bias:
                # transformers initializes parameters without this mark.
                parameter._is_hf_initialized = True
        model.set_submodule(path, new)
        missing_keys.discard(key)


class _Quantize(_ReplaceLayer):
    """Conversion of a dense weight."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict, *, model: nn.Module, missing_keys: set[str], **kwargs
    ) -> dict[str, Tensor]:
        """Replace the layer of each weight by a quantized one."""
        config = self.hf_quantizer.quantization_config
        for key, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            value = value.t() if is_conv1d(model.get_submodule(key.rpartition(".")[0])) else value
            with _name_in_errors(key):
                w = nf4.nf4_quantize(
                    value,
                    blocksize=config.blocksize,
                    nested=config.nested,
                    quant_type=config.quant_type,
                )
                self._replace(model, key, w, missing_keys)
        return {}


class _Read(_ReplaceLayer):
    """Conversion of bitsandbytes' entries."""

    def convert(
        self,
        input_dict: dict,
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **kwargs,
    ) -> dict[str, Tensor]:
        """Replace the layer by a quantized one; return a weight that is not quantized as it is."""
        entries = {
            key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        if len(entries) == 1 and entries["weight"].is_floating_point():
            return input_dict
        with _name_in_errors(full_layer_name):
            w = read_bitsandbytes(entries, "weight")
            self._replace(model, full_layer_name, w, missing_keys)
        return {}
