"""bitsandbytes' 4-bit entries in checkpoints, read and written.

A weight P of a bitsandbytes checkpoint is `P` (the packed bytes), `P.absmax`, `P.quant_map`, and
`P.quant_state.bitsandbytes__nf4` (or `__fp4`), which is JSON as bytes. A nested weight also has
`P.nested_absmax` and `P.nested_quant_map`.
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
    *(_JSON + quant_type for quant_type in nf4_codebooks.QUANT_TYPES),
)
_LONGEST_JSON = 1 << 16  # bytes
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bitsandbytes_entries(w: NF4Weight, key: str) -> dict[str, Tensor]:
    """Return the entries of a weight under `key`, the same as bitsandbytes writes."""
    fields = {
        "quant_type": w.quant_type,
        "blocksize": w.blocksize,
        "dtype": str(w.dtype).removeprefix("torch."),
        "shape": list(w.shape),
    }
    entries = {
        key: w.packed,
        f"{key}.absmax": w.absmax,
        # bitsandbytes writes FP4's negative zero as 0.0.
        f"{key}.quant_map": w.code + 0.0,
    }
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
    """Return the names of the entries that belong to the weight `key`."""
    return {key, *(f"{key}.{suffix}" for suffix in SUFFIXES)} & set(entries)


def read_bitsandbytes(entries: Mapping[str, Tensor], key: str) -> NF4Weight:
    """Return the weight under `key`, sharing the entries' memory.

    Raises:
        CheckpointError: if an entry is missing, damaged or contradicts another.
    """
    quant_type, fields = _read_fields(entries, key)
    packed = _entry(entries, key)
    if packed.dtype != torch.uint8:
        # With bitsandbytes' quant_storage the same bytes are of another dtype.
        packed = packed.reshape(-1).view(torch.uint8)
    shape = tuple(fields["shape"])
    needed = -(-math.prod(shape) // 2)
    if packed.numel() != needed:
        raise CheckpointError(
            f"{key} holds {packed.numel()} bytes; shape {list(shape)} needs {needed}"
        )
    tensors = _read_scales(entries, key, quant_type, fields, packed.device)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{key}: its {name} holds NaN or infinite values")
    try:
        return NF4Weight(
            packed.reshape(-1, 1),
            shape=shape,
            blocksize=fields["blocksize"],
            dtype=_DTYPES[fields["dtype"]],
            quant_type=quant_type,
            **tensors,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{key}: {error}") from None


def _read_scales(
    entries: Mapping[str, Tensor], key: str, quant_type: str, fields: dict, device: torch.device
) -> dict[str, Tensor]:
    """Return the scales and codes of a weight by the names of NF4Weight's fields."""
    code = _entry(entries, f"{key}.quant_map")
    if code.shape == (16,) and torch.equal(code.cpu(), nf4_codebooks.CODE[quant_type]):
        # The file lacks the sign of FP4's negative zero; the table has it.
        code = nf4_codebooks.CODE[quant_type].to(code.device, copy=True)
    tensors = {"absmax": _entry(entries, f"{key}.absmax"), "code": code}
    if "nested_offset" in fields:
        offset = torch.tensor([fields["nested_offset"]], dtype=torch.float32, device=device)
        tensors["nested_absmax"] = _entry(entries, f"{key}.nested_absmax")
        tensors["nested_code"] = _entry(entries, f"{key}.nested_quant_map")
        tensors["offset"] = offset
    elif f"{key}.nested_absmax" in entries or f"{key}.nested_quant_map" in entries:
        raise CheckpointError(f"{key} has nested scales, of which its JSON says nothing")
    return tensors


def _entry(entries: Mapping[str, Tensor], key: str) -> Tensor:
    """Return an entry, contiguous, after checking that it is a dense tensor with values."""
    if key not in entries:
        raise CheckpointError(f"{key} is missing")
    if not isinstance(entries[key], Tensor):
        raise CheckpointError(f"{key} is a {type(entries[key]).__name__}; it must be a tensor")
    if entries[key].is_meta or entries[key].layout != torch.strided:
        raise CheckpointError(
            f"{key} is a {entries[key].layout} tensor on {entries[key].device}; it must hold values"
        )
    return entries[key].contiguous()


def _read_fields(entries: Mapping[str, Tensor], key: str) -> tuple[str, dict]:
    """Return the quantization type and the JSON's fields, each of the right type and range."""
    names = {}
    for quant_type in nf4_codebooks.QUANT_TYPES:
        if (name := f"{key}.{_JSON}{quant_type}") in entries:
            names[quant_type] = name
    if len(names) != 1:
        fault = "both are there" if names else "neither is there; is this a 4-bit checkpoint?"
        raise CheckpointError(
            f"{key}.{_JSON}nf4 or {_JSON}fp4 must say how {key} is quantized, and {fault}"
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
    """Check the type and range of every field; unknown fields are refused."""
    if not isinstance(fields, dict):
        raise CheckpointError(f"{name} holds {type(fields).__name__}; it must be an object")
    rules = {
        "quant_type": (lambda value: value == quant_type, repr(quant_type)),
        "blocksize": (_is_blocksize, "a power of two, 32 to 4096"),
        "dtype": (lambda value: isinstance(value, str) and value in _DTYPES, " or ".join(_DTYPES)),
        "shape": (_is_shape, "a list of sizes"),
    }
    if "nested_offset" in fields or "nested_blocksize" in fields or "nested_dtype" in fields:
        nested_blocksize = nf4_codebooks.NESTED_BLOCKSIZE
        rules |= {
            "nested_blocksize": (lambda value: value == nested_blocksize, str(nested_blocksize)),
            "nested_dtype": (lambda value: value == "float32", "float32"),
            "nested_offset": (_is_finite, "a finite number"),
        }
    for field, (is_valid, must_be) in rules.items():
        if field not in fields:
            raise CheckpointError(f"{name} lacks {field!r}")
        if not is_valid(fields[field]):
            raise CheckpointError(f"{name}: {field} is {fields[field]!r}; it must be {must_be}")
    if unknown := sorted(set(fields) - set(rules)):
        raise CheckpointError(f"{name} has unknown fields {unknown}, which may change its meaning")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_blocksize(value: object) -> bool:
    return _is_int(value) and value in nf4_codebooks.BLOCKSIZES


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_int(value) and abs(value) < 1e38


def _is_shape(value: object) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        return False
    return all(_is_int(size) and 0 <= size < 2**48 for size in value)
