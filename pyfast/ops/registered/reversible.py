"""The step of reversible blocks as a registered op."""

from pyfast import reference
from pyfast._support import registry


def _step_fake(stream, out, subtract, bits, flag):
    if (out.shape, out.device) != (stream.shape, stream.device):
        found, wanted = (f"{list(t.shape)} on {t.device}" for t in (out, stream))
        raise ValueError(f"out is {found}; it must be as stream, {wanted}")


_step = registry.register(
    "reversible_step", fake=_step_fake, cuda=None, reference=reference.reversible_step_op
)
