"""Fast kernels for fine-tuning and long-context training of transformers on small hardware."""

from pyfast import reference
from pyfast.adapter import Adapter, adapter
from pyfast.nf4 import NF4Linear, nf4_dequantize, nf4_linear, nf4_quantize
from pyfast.nf4_weight import NF4Weight

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "NF4Linear",
    "NF4Weight",
    "adapter",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "reference",
]
