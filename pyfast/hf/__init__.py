"""transformers, PEFT and bitsandbytes on pyfast's kernels.

This is the only folder of pyfast that imports these libraries at import time. Importing it
registers two names with transformers: the quantization "pyfast_nf4" and the attention "pyfast_lsh".
`NF4Config` stands for the quantization; files that were saved with it need this import to load.
"""

from pyfast.hf import attention as _  # noqa: F401
from pyfast.hf.loading import load_quantized
from pyfast.hf.patching import Patched, patch, unpatch
from pyfast.hf.quantizer import NF4Config

__all__ = ["NF4Config", "Patched", "load_quantized", "patch", "unpatch"]
