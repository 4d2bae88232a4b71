"""Compilation of Triton kernels without a GPU, and a reader of the compiled instructions."""

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
# Bytes of shared memory that a block may have, by capability.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


class Build(NamedTuple):
    """A kernel and everything that decides what it compiles to.

    Attributes:
        capability: 10 times the compute capability.
        kernel: "module.name" in pyfast.kernels.
        pointers: Pairs of a parameter and its type.
        constants: Pairs of a parameter and its value.
        options: Pairs of a launch option and its value.
        aligned: The integer parameters that 16 divides.
        floats: The float parameters.
        tuples: Pairs of a parameter and its members. A member is a type, "i32:16" for an integer
            that 16 divides, or the value of a constant.
    """

    capability: int
    kernel: str
    pointers: tuple
    constants: tuple
    options: tuple
    aligned: tuple
    floats: tuple = ()
    tuples: tuple = ()


class Compiled(NamedTuple):
    """What a compiled kernel uses.

    Attributes:
        registers: Registers of a thread.
        spilled: Bytes of stack and local memory.
        shared: Bytes of shared memory.
        wide: Operands of products that are laid out wider than they are.
        ptx: The program before ptxas.
        cubin: The program after it, which `sass` reads.
    """

    registers: int
    spilled: int
    shared: int
    wide: tuple
    ptx: str
    cubin: bytes


@functools.cache
def compile_kernel(build: Build) -> Compiled:
    """Compile a kernel with Triton and ptxas."""
    source = source_of(build)
    with tempfile.TemporaryDirectory() as directory, triton.knobs.cache.scope():
        # The cache starts empty, because what another run compiled says nothing.
        triton.knobs.cache.dir = directory
        compiled = triton.compile(
            source, target=GPUTarget("cuda", build.capability, 32), options=dict(build.options)
        )
    usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", dump(compiled.asm["cubin"], "-res-usage"))
    usage = {key: int(value) for key, value in usage}
    return Compiled(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        wide=tuple(wide_operands(compiled.asm["ttgir"])),
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
    )


def dump(cubin: bytes, option: str) -> str:
    """Return what cuobjdump says of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def sass(compiled: Compiled) -> list[tuple[int, str]]:
    """Return pairs of an address and its instruction, which takes as long as compiling a kernel."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", dump(compiled.cubin, "-sass"))
    return [(int(address, 16), text.strip()) for address, text in lines]


def has_tensor_cores(compiled: Compiled) -> bool:
    """Return whether a kernel multiplies on tensor cores, of any generation and precision."""
    return bool(re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.ptx))


def has_atomics(compiled: Compiled) -> bool:
    """Return whether a kernel adds to memory atomically, in an order that is not fixed."""
    return bool(re.search(r"\b(red|atom)\.", compiled.ptx))


def wide_operands(ttgir: str) -> list[tuple[int, int]]:
    """Return (columns, kWidth) of the left operands whose four threads hold too many columns.

    Triton miscompiles products with such operands.
    """
    operand = (
        r"(?:tt\.|_group_)dot .*? : tensor<\d+x(\d+)x\w+, "
        r"#ttg\.dot_op<\{opIdx = 0,[^}]*kWidth = (\d+)"
    )
    operands = [(int(columns), int(width)) for columns, width in re.findall(operand, ttgir)]
    return [(columns, width) for columns, width in operands if columns < 4 * width]


def source_of(build: Build) -> ASTSource:
    """Return the source that Triton compiles, with signature, constants and divisibility."""
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
        position = fn.arg_names.index(name)
        types = [m if isinstance(m, str) else "constexpr" for m in members]
        signature[name] = tuple(t.removesuffix(":16") for t in types)
        for i, member in enumerate(members):
            if types[i] == "constexpr":
                constants[position, i] = member
            elif types[i][0] == "*" or types[i].endswith(":16"):
                attrs[position, i] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature=signature, constexprs=constants, attrs=attrs)


def launches(run, capability):
    """Return the Builds of all kernels that run() launches; its tensors need no memory."""
    if INTERPRETED:
        # The tests that compile are deselected in the interpreter.
        return [None]
    builds = []

    def record(kernel, *args, grid, warmup, **constants):
        names = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
        options = {name: constants.pop(name) for name in names if name in constants}
        bound = dict(zip(kernel.arg_names, args)) | constants
        pointers = {k: NAMES[v.dtype] for k, v in bound.items() if isinstance(v, torch.Tensor)}
        floats = tuple(k for k, v in bound.items() if isinstance(v, float))
        general = {p.name for p in kernel.params if p.do_not_specialize}
        integers = {}
        for k, v in bound.items():
            if isinstance(v, int) and k not in constants and k not in general:
                integers[k] = v
        constants |= {k: v for k, v in bound.items() if v is None or (k in integers and v == 1)}
        aligned = tuple(k for k, v in integers.items() if v != 1 and v % 16 == 0)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        items = (tuple(d.items()) for d in (pointers, constants, options))
        tuples = []
        for k, v in bound.items():
            if isinstance(v, tuple) and k not in constants:
                tuples.append((k, tuple(map(_member, v))))
        builds.append(Build(capability, name, *items, aligned, floats, tuple(tuples)))

    with mock.patch.object(triton.JITFunction, "run", record):
        run()
    return builds


def _member(value):
    """Return the member of a Build's tuple for a value."""
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, triton.language.constexpr) or value == 1:
        return getattr(value, "value", value)
    return "i32:16" if value % 16 == 0 else "i32"


@pytest.fixture
def checked(build) -> Compiled:
    """A compiled kernel that is not empty, spills nothing and fits in shared memory."""
    result = compile_kernel(build)
    assert result.registers > 8, "an empty kernel: miscompiled"
    assert result.spilled == 0
    assert result.shared <= SHARED[build.capability]
    assert not result.wide, "four threads times kWidth are more columns than there are: miscompiled"
    return result


def has(compiled, *opcodes):
    """Return whether the kernel has an instruction that matches one of the patterns."""
    return any(re.search(rf"\b(?:{'|'.join(opcodes)})", text) for _, text in sass(compiled))


def main_loop(sass):
    """Return the instructions of the longest innermost loop.

    A loop goes from the target of a backward branch to the branch.
    """
    loops = []
    for address, text in sass:
        target = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return [text for address, text in sass if start <= address <= end]


def every_capability(cases):
    """Parametrize a test by `build`: each case (id, capability -> Build) for each capability."""
    builds = []
    for name, make in cases:
        for capability in SHARED:
            builds.append(pytest.param(make(capability), id=f"{name}-sm_{capability}"))
    return pytest.mark.parametrize("build", builds)
