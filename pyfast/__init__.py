"""Fast kernels for fine-tuning and long-context training of transformers on small hardware."""

import importlib

from pyfast import reference
from pyfast._version import __version__ as __version__
from pyfast.adapters.api import (
    add_adapters,
    add_lora,
    merge,
    mixed_batch,
    remove_adapter,
    set_adapter,
    unmerge,
)
from pyfast.adapters.bottleneck.config import AdapterConfig
from pyfast.adapters.files import load_adapter, save_adapter
from pyfast.adapters.lora.config import LoRAConfig
from pyfast.adapters.lora.layer import LoRALinear
from pyfast.adapters.parameter_summary import summary
from pyfast.adapters.quantization import quantize
from pyfast.adapters.selection import select
from pyfast.formats.errors import CheckpointError
from pyfast.formats.nf4_weight import NF4Weight
from pyfast.models.reformer.cache import ReformerCache
from pyfast.models.reformer.config import ReformerConfig
from pyfast.models.reformer.model import Reformer
from pyfast.nn.adapter import Adapter
from pyfast.nn.chunked import ChunkedFeedForward
from pyfast.nn.local_attention import LocalCache, LocalSelfAttention
from pyfast.nn.lsh_cache import LSHCache
from pyfast.nn.lsh_self_attention import LSHSelfAttention
from pyfast.nn.nf4_linear import NF4Linear
from pyfast.nn.reversible import ReversibleSequence
from pyfast.ops.adapter import adapter
from pyfast.ops.chunked import chunked_cross_entropy, chunked_feed_forward
from pyfast.ops.dora import row_squares
from pyfast.ops.local_attention import local_attention
from pyfast.ops.lora import lora_linear, lora_linears, multi_lora_linear
from pyfast.ops.lora_arguments import Projection
from pyfast.ops.lsh_attention import lsh_attention
from pyfast.ops.lsh_hash import lsh_buckets
from pyfast.ops.nf4 import nf4_dequantize, nf4_linear, nf4_quantize
from pyfast.ops.reversible import reversible
from pyfast.reference.lsh_options import PRESETS as LSH_PRESETS

__all__ = [
    "LSH_PRESETS",
    "Adapter",
    "AdapterConfig",
    "CheckpointError",
    "ChunkedFeedForward",
    "LSHCache",
    "LSHSelfAttention",
    "LoRAConfig",
    "LoRALinear",
    "LocalCache",
    "LocalSelfAttention",
    "NF4Linear",
    "NF4Weight",
    "Projection",
    "Reformer",
    "ReformerCache",
    "ReformerConfig",
    "ReversibleSequence",
    "adapter",
    "add_adapters",
    "add_lora",
    "chunked_cross_entropy",
    "chunked_feed_forward",
    "load_adapter",
    "local_attention",
    "lora_linear",
    "lora_linears",
    "lsh_attention",
    "lsh_buckets",
    "merge",
    "mixed_batch",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "quantize",
    "reference",
    "remove_adapter",
    "reversible",
    "row_squares",
    "save_adapter",
    "select",
    "set_adapter",
    "summary",
    "unmerge",
]


def __getattr__(name: str):
    """Import `pyfast.hf` at its first use, because it imports transformers."""
    if name == "hf":
        return importlib.import_module("pyfast.hf")
    raise AttributeError(f"module 'pyfast' has no attribute {name!r}")
