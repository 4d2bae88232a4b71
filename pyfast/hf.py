"""transformers, PEFT and bitsandbytes with pyfast's kernels. The rest of pyfast imports none of them."""

from pyfast.hf_patch import Patched, patch, unpatch

__all__ = ["Patched", "patch", "unpatch"]
