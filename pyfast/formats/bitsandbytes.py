"""Other libraries' files, both ways: bitsandbytes' 4-bit entries.

A weight P of a bitsandbytes checkpoint is `P` (the packed bytes), `P.absmax`, `P.quant_map`, nested
also `P.nested_absmax` and `P.nested_quant_map`, and `P.quant_state.bitsandbytes__nf4` (or `__fp4`):
JSON, as bytes.
"""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyfast.formats import nf4_codebooks
from pyfast.formats.errors import CheckpointError
from pyfast.formats.nf4_weight import NF4Weight

_JSON = "quant_state.bitsandbytes__"
SUFFIXES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *(_JSON + q for q in nf4_codebooks.QUANT_TYPES),
)
_LONGEST_JSON = 1 << 16
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bitsandbytes_entries(w: NF4Weight, key: str) -> dict[str, Tensor]:
    """The entries of weight `key`, as bitsandbytes writes them."""
    fields = {
        "quant_type": w.quant_type,
        "blocksize": w.blocksize,
        "dtype": str(w.dtype).removeprefix("torch."),
        "shape": list(w.shape),
    }
    entries = {
        key: w.packed,
        f"{key}.absmax": w.absmax,
        f"{key}.quant_map": w.code + 0.0,
    }  # no -0.0
    if w.nested:
        entries[f"{key}.nested_absmax"] = w.nested_absmax
        entries[f"{key}.nested_quant_map"] = w.nested_code
        fields |= {"nested_blocksize": nf4_codebooks.NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        # A layer without data (on the meta device) has keys and sizes, but no value to write.
        fields["nested_offset"] = 0.0 if w.offset.is_meta else w.offset.item()
    text = torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)
    entries[f"{key}.{_JSON}{w.quant_type}"] = text
    return entries


def bitsandbytes_keys(entries: Mapping[str, Tensor], key: str) -> set[str]:
    """Those of the entries that belong to weight `key`."""
    return {key, *(f"{key}.{suffix}" for suffix in SUFFIXES)} & set(entries)


def read_bitsandbytes(entries: Mapping[str, Tensor], key: str) -> NF4Weight:
    """The weight under `key`, sharing the entries' memory; a CheckpointError if anything is amiss."""
    quant_type, fields = _fields(entries, key)
    packed = _entry(entries, key)
    if (
        packed.dtype != torch.uint8
    ):  # bitsandbytes' quant_storage: the same bytes under another name
        packed = packed.reshape(-1).view(torch.uint8)
    shape = tuple(fields["shape"])
    needed = -(-math.prod(shape) // 2)
    if packed.numel() != needed:
        raise CheckpointError(
            f"{key} holds {packed.numel()} bytes; shape {list(shape)} needs {needed}"
        )
    code = _entry(entries, f"{key}.quant_map")
    if code.shape == (16,) and torch.equal(code.cpu(), nf4_codebooks.CODE[quant_type]):
        code = nf4_codebooks.CODE[quant_type].to(
            code.device, copy=True
        )  # FP4's negative zero is not in the file
    tensors = {"absmax": _entry(entries, f"{key}.absmax"), "code": code}
    if "nested_offset" in fields:
        tensors["nested_absmax"] = _entry(entries, f"{key}.nested_absmax")
        tensors["nested_code"] = _entry(entries, f"{key}.nested_quant_map")
        tensors["offset"] = torch.tensor(
            [fields["nested_offset"]], dtype=torch.float32, device=packed.device
        )
    elif f"{key}.nested_absmax" in entries or f"{key}.nested_quant_map" in entries:
        raise CheckpointError(f"{key} has nested scales, of which its JSON says nothing")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{key}: its {name} holds NaN or infinite values")
    try:
        described = {
            "shape": shape,
            "blocksize": fields["blocksize"],
            "dtype": _DTYPES[fields["dtype"]],
        }
        return NF4Weight(packed.reshape(-1, 1), quant_type=quant_type, **described, **tensors)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{key}: {error}") from None


def _entry(entries: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in entries:
        raise CheckpointError(f"{key} is missing")
    if not isinstance(entries[key], Tensor):
        raise CheckpointError(f"{key} is a {type(entries[key]).__name__}; it must be a tensor")
    if entries[key].is_meta or entries[key].layout != torch.strided:
        raise CheckpointError(
            f"{key} is a {entries[key].layout} tensor on {entries[key].device}; it must hold values"
        )
    return entries[key].contiguous()


def _fields(entries: Mapping[str, Tensor], key: str) -> tuple[str, dict]:
    """The quantization type and the JSON's fields, each of the right type and range."""
    names = {
        q: f"{key}.{_JSON}{q}" for q in nf4_codebooks.QUANT_TYPES if f"{key}.{_JSON}{q}" in entries
    }
    if len(names) != 1:
        found = "both are there" if names else "neither is there; is this a 4-bit checkpoint?"
        raise CheckpointError(
            f"{key}.{_JSON}nf4 or {_JSON}fp4 must say how {key} is quantized, and {found}"
        )
    ((quant_type, name),) = names.items()
    text = _entry(entries, name)
    if text.dtype != torch.uint8 or text.dim() != 1 or text.numel() > _LONGEST_JSON:
        raise CheckpointError(
            f"{name} is {text.dtype} {list(text.shape)}; it must be JSON as at most 65536 bytes"
        )
    try:
        fields = json.loads(bytes(text.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from None
    _check_fields(fields, name, quant_type)
    return quant_type, fields


def _check_fields(fields: object, name: str, quant_type: str) -> None:
    if not isinstance(fields, dict):
        raise CheckpointError(f"{name} holds {type(fields).__name__}; it must be an object")
    rules = {
        "quant_type": (lambda v: v == quant_type, repr(quant_type)),
        "blocksize": (
            lambda v: _is_int(v) and v in nf4_codebooks.BLOCKSIZES,
            "a power of two, 32 to 4096",
        ),
        "dtype": (lambda v: isinstance(v, str) and v in _DTYPES, " or ".join(_DTYPES)),
        "shape": (_is_shape, "a list of sizes"),
    }
    if "nested_offset" in fields or "nested_blocksize" in fields or "nested_dtype" in fields:
        rules |= {
            "nested_blocksize": (
                lambda v: v == nf4_codebooks.NESTED_BLOCKSIZE,
                str(nf4_codebooks.NESTED_BLOCKSIZE),
            ),
            "nested_dtype": (lambda v: v == "float32", "float32"),
            "nested_offset": (_is_finite, "a finite number"),
        }
    for field, (holds, must_be) in rules.items():
        if field not in fields:
            raise CheckpointError(f"{name} lacks {field!r}")
        if not holds(fields[field]):
            raise CheckpointError(f"{name}: {field} is {fields[field]!r}; it must be {must_be}")
    if unknown := sorted(set(fields) - set(rules)):
        raise CheckpointError(f"{name} has unknown fields {unknown}, which may change its meaning")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (
        _is_int(value) and abs(value) < 1e38
    )


def _is_shape(value: object) -> bool:
    few = isinstance(value, list) and 1 <= len(value) <= 8
    return few and all(_is_int(size) and 0 <= size < 2**48 for size in value)
