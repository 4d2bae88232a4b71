"""The compiled module `pyfast._C`, loaded once, with a check that it was built for this torch."""

import importlib.metadata
import os
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parents[1]
_CURE = (
    "reinstall it for this torch: "
    "pip install --force-reinstall --no-deps --no-build-isolation <pyfast checkout>"
)


def _load_compiled():
    """Return pyfast._C, or raise an ImportError that says which torch it was built for."""
    try:
        import pyfast._C as _C  # here, because its failure is explained below
    except ImportError as error:
        if is_unbuilt_checkout(_PACKAGE):
            raise ImportError(
                f"{_PACKAGE} is a source checkout without its compiled part, and would "
                "hide an installed pyfast; build it in place (pip install -e .) or run from "
                "another folder"
            ) from None
        message = f"pyfast's compiled part does not load under torch {torch.__version__}"
        if built := _required_torch():
            message += f" (it was built for torch {built})"
        raise ImportError(f"{message}; {_CURE}. The loader said: {error}") from error
    if _series(_C.torch_version) != _series(torch.__version__):
        raise ImportError(
            f"pyfast was built for torch {_C.torch_version} and found {torch.__version__}; {_CURE}"
        )
    requested = os.environ.get("PYFAST_CPU")
    if requested and _C.isa() != requested:  # isa() raises a ValueError for an unknown name
        warnings.warn(f"pyfast: {_C.isa_reason()}; {_C.isa()} kernels run instead", stacklevel=2)
    return _C


def is_unbuilt_checkout(package: Path) -> bool:
    """Return whether `package` lies in a source checkout and has no compiled part in it."""
    is_checkout = (package.parent / "setup.py").is_file() and (package.parent / "csrc").is_dir()
    return is_checkout and not any((package / f"_C{end}").exists() for end in EXTENSION_SUFFIXES)


def _series(version: str) -> list[str]:
    return version.split(".")[:2]


def _required_torch() -> str | None:
    try:
        requirements = importlib.metadata.requires("pyfast-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((r.removeprefix("torch==") for r in requirements if r.startswith("torch==")), None)


C = _load_compiled()
