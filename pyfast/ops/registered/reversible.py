"""The step of reversible blocks as a registered op.

The CPU kernel is in csrc/cpu/reversible/step.cpp, the GPU kernel in csrc/cuda/reversible.cu.
"""

from pyfast import reference
from pyfast._support import registry


def _check_step(stream, out, subtract, bits, flag) -> None:
    if (out.shape, out.device) != (stream.shape, stream.device):
        actual, expected = (f"{list(t.shape)} on {t.device}" for t in (out, stream))
        raise ValueError(f"out is {actual}; it must be as stream, {expected}")


def _step_fake(stream, out, subtract, bits, flag) -> None:
    """Return nothing: the op changes `stream` and `flag` in place."""


reversible_step = registry.register(
    "reversible_step",
    check=_check_step,
    fake=_step_fake,
    kernel=None,
    reference=reference.reversible_step_op,
)
