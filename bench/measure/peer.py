"""What the implementations to compare with have in common: a name, and a reason why one is missing.

`make bench` puts what would disturb our own environment into a folder beside it, which is searched
last.
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


def search_last(folder: pathlib.Path) -> None:
    """For modules, and for the versions of packages."""
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))


search_last(pathlib.Path(sys.prefix, "peers"))


class Skip(Exception):
    """This implementation does not do this case; the message says why."""


class Lacks(Exception):
    """This implementation has no such operation: no row at all."""


class Peer:
    name: str
    module: str | None = None  # that it is from
    own_format = False  # holds other numbers than the reference's: errors are not comparable
    trains = True  # has a backward
    dtype: torch.dtype | None = None  # computes in this one whatever the case's dtype

    def missing(self, device: str) -> str | None:
        """Why it can't run here at all, or None."""
        if self.module is None:
            return None
        try:
            load(self.module)
        except Exception as error:
            return reason(error)


def by_name(*peers: Peer) -> dict[str, Peer]:
    return {peer.name: peer for peer in peers}


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def quiet():
    """Peers print banners, warn and log while they are imported or first used."""
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


def reason(error: BaseException) -> str:
    """One short line out of an exception."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    name = "" if isinstance(error, Skip | ImportError) else type(error).__name__ + ": "
    return (name + text)[:90]


@functools.cache
def load(module: str) -> Any:
    if module.startswith("unsloth"):
        # Its import would route bitsandbytes' layers through its own kernels.
        os.environ.setdefault("UNSLOTH_BNB_NF4_LINEAR", "0")
    with quiet():
        return importlib.import_module(module)
