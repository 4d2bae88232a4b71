"""Fast kernels for fine-tuning and long-context training of transformers on small hardware."""

import importlib

from pyfast import reference
from pyfast.adapter import Adapter, adapter
from pyfast.adapter_config import AdapterConfig
from pyfast.adapter_files import load_adapter, save_adapter
from pyfast.checkpoint import CheckpointError
from pyfast.chunked import ChunkedFeedForward, chunked_cross_entropy, chunked_feed_forward
from pyfast.finetune import (
    add_adapters,
    add_lora,
    merge,
    mixed_batch,
    remove_adapter,
    set_adapter,
    unmerge,
)
from pyfast.local_attention import LocalCache, LocalSelfAttention, local_attention
from pyfast.lora import Projection, lora_linear, lora_linears, multi_lora_linear
from pyfast.lora_config import LoRAConfig
from pyfast.lora_layer import LoRALinear
from pyfast.lsh_attention import lsh_attention
from pyfast.lsh_cache import LSHCache
from pyfast.lsh_choices import PRESETS as LSH_PRESETS
from pyfast.lsh_hash import lsh_buckets
from pyfast.lsh_layer import LSHSelfAttention
from pyfast.nf4 import NF4Linear, nf4_dequantize, nf4_linear, nf4_quantize
from pyfast.nf4_weight import NF4Weight
from pyfast.quantize import quantize
from pyfast.reformer import Reformer, ReformerCache
from pyfast.reformer_config import ReformerConfig
from pyfast.reversible import ReversibleSequence, reversible
from pyfast.selection import select
from pyfast.summary import summary

__version__ = "0.1.0"
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
    "save_adapter",
    "select",
    "set_adapter",
    "summary",
    "unmerge",
]


def __getattr__(name: str):
    """pyfast.hf, which imports transformers, when it is asked for."""
    if name == "hf":
        return importlib.import_module("pyfast.hf")
    raise AttributeError(f"module 'pyfast' has no attribute {name!r}")
