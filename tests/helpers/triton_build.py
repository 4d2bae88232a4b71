"""Compiling kernels for GPUs that are not there, and reading what came out."""

import functools
import importlib
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
HERE = pathlib.Path(__file__).parents[1]
INTERPRETED = triton.knobs.runtime.interpret
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have


class Build(NamedTuple):
    """A kernel and all that decides what it compiles to; `aligned` names the integers that 16
    divides.

    A tuple's members are types, "i32:16" of an integer that 16 divides, or the values of constants.
    """

    capability: int
    kernel: str  # module.name
    pointers: tuple  # of (name, type), as the next two
    constants: tuple
    options: tuple
    aligned: tuple
    floats: tuple = ()
    tuples: tuple = ()  # of (name, members)


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int
    sass: list  # of (address, instruction)
    wide: list  # operands of products that are laid out wider than they are


@functools.cache
def compile_kernel(build: Build) -> Compiled:
    source = source_of(build)
    with tempfile.TemporaryDirectory() as directory, triton.knobs.cache.scope():
        triton.knobs.cache.dir = directory  # an empty one: what another run compiled says nothing
        compiled = triton.compile(
            source, target=GPUTarget("cuda", build.capability, 32), options=dict(build.options)
        )
        file = pathlib.Path(directory, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", "-sass", file]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", listing)
    spilled = found["STACK"] + found["LOCAL"]
    sass = [(int(address, 16), text.strip()) for address, text in lines]
    return Compiled(
        found["REG"], spilled, compiled.metadata.shared, sass, wide_operands(compiled.asm["ttgir"])
    )


def wide_operands(ttgir: str) -> list[tuple[int, int]]:
    """(columns, kWidth) of the left operands of products whose four threads hold more columns than there are."""
    operand = r"(?:tt\.|_group_)dot .*? : tensor<\d+x(\d+)x\w+, #ttg\.dot_op<\{opIdx = 0,[^}]*kWidth = (\d+)"
    found = [(int(columns), int(width)) for columns, width in re.findall(operand, ttgir)]
    return [(columns, width) for columns, width in found if columns < 4 * width]


def source_of(build: Build) -> ASTSource:
    module, name = build.kernel.split(".")
    fn = getattr(importlib.import_module(f"pyfast.kernels.{module}"), name)
    pointers, constants = dict(build.pointers), dict(build.constants)
    assert not (pointers.keys() | constants.keys() | dict(build.tuples).keys()) - set(fn.arg_names)
    signature = {name: "*" + pointers[name] if name in pointers else "i32" for name in fn.arg_names}
    signature |= dict.fromkeys(constants, "constexpr") | dict.fromkeys(build.floats, "fp32")
    divisible = [
        i for i, name in enumerate(fn.arg_names) if name in pointers or name in build.aligned
    ]
    attrs = {(i,): [["tt.divisibility", 16]] for i in divisible}
    for name, members in build.tuples:
        at, types = (
            fn.arg_names.index(name),
            [m if isinstance(m, str) else "constexpr" for m in members],
        )
        signature[name] = tuple(t.removesuffix(":16") for t in types)
        constants |= {(at, i): m for i, m in enumerate(members) if types[i] == "constexpr"}
        attrs |= {
            (at, i): [["tt.divisibility", 16]]
            for i, t in enumerate(types)
            if t[0] == "*" or t[-3:] == ":16"
        }
    return ASTSource(fn, signature=signature, constexprs=constants, attrs=attrs)


def launches(run, capability):
    """The Builds of all that run() launches, which may be on tensors without memory."""
    if INTERPRETED:
        return [None]  # where the tests that compile are deselected
    found = []

    def record(kernel, *args, grid, warmup, **constants):
        options = {
            k: constants.pop(k)
            for k in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
            if k in constants
        }
        bound = dict(zip(kernel.arg_names, args)) | constants
        pointers = {k: NAMES[v.dtype] for k, v in bound.items() if isinstance(v, torch.Tensor)}
        floats = tuple(k for k, v in bound.items() if isinstance(v, float))
        general = {p.name for p in kernel.params if p.do_not_specialize}
        integers = {
            k: v
            for k, v in bound.items()
            if k not in constants and k not in general and isinstance(v, int)
        }
        constants |= {k: v for k, v in bound.items() if v is None or (k in integers and v == 1)}
        aligned = tuple(k for k, v in integers.items() if v != 1 and v % 16 == 0)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        items = (tuple(d.items()) for d in (pointers, constants, options))
        tuples = tuple(
            (k, tuple(map(_member, v)))
            for k, v in bound.items()
            if isinstance(v, tuple) and k not in constants
        )
        found.append(Build(capability, name, *items, aligned, floats, tuples))

    with mock.patch.object(triton.JITFunction, "run", record):
        run()
    return found


def _member(value):
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, triton.language.constexpr) or value == 1:
        return getattr(value, "value", value)
    return "i32:16" if value % 16 == 0 else "i32"


@pytest.fixture
def checked(build) -> Compiled:
    result = compile_kernel(build)
    assert result.registers > 8, "an empty kernel: miscompiled"
    assert result.spilled == 0 and not has(result, "LDL", "STL")
    assert result.shared <= SHARED[build.capability]
    assert not result.wide, "four threads times kWidth are more columns than there are: miscompiled"
    return result


def has(compiled, *opcodes):
    return any(re.search(rf"\b(?:{'|'.join(opcodes)})", text) for _, text in compiled.sass)


def main_loop(sass):
    """The instructions of the longest innermost loop: from a backward branch's target to the branch."""
    loops = []
    for address, text in sass:
        target = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return [text for address, text in sass if start <= address <= end]


def every_capability(cases):
    """Gives a test each `build` of the cases (id, capability -> Build)."""
    each = [(name, make, capability) for name, make in cases for capability in SHARED]
    return pytest.mark.parametrize(
        "build", [pytest.param(make(c), id=f"{name}-sm_{c}") for name, make, c in each]
    )
