"""transformers, PEFT and bitsandbytes with pyfast's kernels. The rest of pyfast imports none of
them.

Importing this registers two names with transformers: the quantization "pyfast_nf4", which
`NF4Config` stands for and files saved with it need, and the attention "pyfast_lsh".
"""

from pyfast.hf import attention as _  # noqa: F401
from pyfast.hf.loading import load_quantized
from pyfast.hf.patching import Patched, patch, unpatch
from pyfast.hf.quantizer import NF4Config

__all__ = ["NF4Config", "Patched", "load_quantized", "patch", "unpatch"]
