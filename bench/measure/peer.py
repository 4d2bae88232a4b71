"""Base class and helpers for the implementations that are compared.

`make bench` installs packages that would disturb the environment into a separate folder,
`peers`, which is searched last.
"""

import contextlib
import functools
import importlib
import io
import logging
import os
import pathlib
import sys
import warnings
from typing import Any

import torch


def append_to_path(folder: pathlib.Path) -> None:
    """Append a folder to the search path of modules and of package versions."""
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))


append_to_path(pathlib.Path(sys.prefix, "peers"))


class SkippedCase(Exception):
    """Raised where an implementation does not run a case; the message says why."""


class MissingOperation(Exception):
    """Raised where an implementation has no such operation; it gets no row at all."""


class Peer:
    """An implementation that is measured; pyfast's own is one too."""

    name: str
    module: str | None = None  # the module that it is imported from
    # It holds other numbers than the reference, so that errors are not comparable.
    has_different_format = False
    has_backward = True
    dtype: torch.dtype | None = None  # computes in this dtype, whatever the case's is

    def missing_reason(self, device: str) -> str | None:
        """Return why it cannot run on this machine at all, or None if it can."""
        if self.module is None:
            return None
        try:
            load_module(self.module)
        except Exception as error:
            return describe_error(error)


def index_by_name(*peers: Peer) -> dict[str, Peer]:
    """Return the peers keyed by their names."""
    return {peer.name: peer for peer in peers}


def count_bytes(*tensors: torch.Tensor) -> int:
    """Return the bytes of all elements of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def silence():
    """Suppress output, warnings and logs: peers print banners when first imported or used."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def describe_error(error: BaseException) -> str:
    """Return one short line that describes an exception."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    name = "" if isinstance(error, SkippedCase | ImportError) else type(error).__name__ + ": "
    return (name + text)[:90]


@functools.cache
def load_module(module: str) -> Any:
    """Import an optional package quietly, and only once."""
    if module.startswith("unsloth"):
        # Importing unsloth would route bitsandbytes' layers through unsloth's kernels.
        os.environ.setdefault("UNSLOTH_BNB_NF4_LINEAR", "0")
    with silence():
        return importlib.import_module(module)
