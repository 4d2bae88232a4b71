"""Every NF4 kernel, in every configuration a launcher uses, compiled for sm_80, sm_90 and sm_100 without a GPU.

What a compiler can tell: no spills, shared memory that fits, tensor cores where they are claimed, and how many
instructions the main loop spends on a weight, which at M <= 16 caps the bandwidth. The bounds are the counts of
Triton 3.6 and 3.9 plus a small margin.
"""

import functools
import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter cannot compile"
)
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CAPABILITIES = list(SHARED)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def load_nf4():
    """pyfast.kernels.nf4, if that is this checkout's (another may be installed); else the file itself."""
    path = pathlib.Path(__file__).parents[1] / "kernels" / "nf4.py"
    try:
        module = importlib.import_module("pyfast.kernels.nf4")
        if path.samefile(module.__file__):
            return module
    except ImportError:
        pass
    spec = importlib.util.spec_from_file_location("nf4", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nf4"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def build(kernel, capability, pointers, integers, constants, options):
    """(resources, main loop, whole SASS) of a kernel of nf4.py. `integers` name divisors of 16 in capitals."""
    fn = getattr(load_nf4(), kernel)
    pointers, constants = dict(pointers), dict(constants)
    signature = {}
    for name in fn.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
        else:
            signature[name] = "i32"
    aligned = [i for i, name in enumerate(fn.arg_names) if name in pointers or name in integers]
    source = ASTSource(
        fn,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(options)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = dump([CUOBJDUMP, "-res-usage", file.name]).stdout
        sass = dump([CUOBJDUMP, "-sass", file.name]).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {**found, "SHARED": compiled.metadata.shared}, instructions(sass)


def instructions(sass):
    """[(address, text)] of a cuobjdump listing."""
    return [
        (int(a, 16), t.strip()) for a, t in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", sass)
    ]


def main_loop(code):
    """The instructions of the loop with the most of them, innermost: from a backward branch's target to it."""
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return [text for address, text in code if start <= address <= end]


# ---------------------------------------------------------------- configurations

WEIGHT = {
    "packed_ptr": "u8",
    "code_ptr": "fp32",
    "nested_absmax_ptr": "fp32",
    "nested_code_ptr": "fp32",
    "offset_ptr": "fp32",
}


def product(
    kernel, capability, m, dtype, path, *, nested=True, blocksize=64, aligned=True, splits=False
):
    """One of the three kernels of linear and linear_backward, as its launcher configures it."""
    nf4 = load_nf4()
    op = {"_linear_words_kernel": "linear_words", "_linear_kernel": "linear"}.get(
        kernel, "linear_backward"
    )
    config = nf4.tile_config(
        op, path, m, 4096, TYPES[dtype], blocksize, (capability // 10, capability % 10)
    )
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")} | {
        "enable_fp_fusion": True
    }
    out = "fp32" if splits else dtype
    pointers = {**WEIGHT, "absmax_ptr": "u8" if nested else "fp32"}
    constants = {**config, "BLOCKSIZE": blocksize, "NESTED": nested}
    if op == "linear_backward":
        pointers |= {"dy_ptr": dtype, "dx_ptr": out}
        constants |= {"ALIGNED": aligned}
    else:
        pointers |= {"x_ptr": dtype, "bias_ptr": dtype, "y_ptr": out}
        constants |= {"HAS_BIAS": not splits}
        constants |= (
            {"ASM": True} if op == "linear_words" else {"ALIGNED": aligned, "PAIRED": aligned}
        )
    if dtype == "fp32" and op == "linear":
        constants["PAIRED"] = False
    found, code = build(
        kernel,
        capability,
        tuple(pointers.items()),
        ("n", "k") if aligned else (),
        tuple(constants.items()),
        tuple(options.items()),
    )
    weights = config["BN"] * config["BK"] / (32 * options["num_warps"])
    return found, code, len(main_loop(code)) / weights


def other(kernel, capability, pointers, integers, constants, num_warps):
    return build(
        kernel,
        capability,
        tuple(pointers.items()),
        integers,
        tuple(constants.items()),
        (("num_warps", num_warps), ("enable_fp_fusion", False)),
    )


def check(found, capability):
    assert found["REG"] > 8, "an empty kernel: miscompiled"
    assert found["STACK"] == 0 and found["LOCAL"] == 0, found
    assert found["SHARED"] <= SHARED[capability], found


def has(code, *opcodes):
    return any(re.search(rf"\b(?:{'|'.join(opcodes)})", text) for _, text in code)


# SASS instructions of the main loop a weight and tile of M: what the compiler gives today, and a little.
PER_WEIGHT = {
    80: {1: 4.2, 16: 4.6, 32: 5.8, 64: 6.6, 128: 12.0},
    90: {1: 4.2, 16: 4.6, 32: 5.5, 64: 6.1, 128: 10.0},
    100: {1: 4.7, 16: 5.0, 32: 6.8, 64: 7.3, 128: 7.3},
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("m", [1, 16, 32, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "nested", "splits"), [("bf16", True, False), ("fp16", False, True)]
)
def test_linear_words(m, dtype, nested, splits, capability):
    path = "gemv" if m <= 16 else "fused"
    found, code, per_weight = product(
        "_linear_words_kernel", capability, m, dtype, path, nested=nested, splits=splits
    )
    check(found, capability)
    # Two warps cannot form the warpgroup that wgmma and tcgen05 need: up to M = 16, mma.sync everywhere.
    warpgroup = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
    assert has(code, "HMMA" if path == "gemv" else warpgroup[capability])
    assert not has(code, "LDL", "STL")
    assert per_weight <= PER_WEIGHT[capability][m], per_weight


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("blocksize", [128, 4096])
def test_linear_words_blocksizes(blocksize, capability):
    for m, path in ((1, "gemv"), (64, "fused")):
        found, _, _ = product(
            "_linear_words_kernel", capability, m, "bf16", path, blocksize=blocksize
        )
        check(found, capability)


GENERAL = {"aligned": (64, True), "any": (64, False), "blocksize 32": (32, True)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", GENERAL)
@pytest.mark.parametrize("kernel", ["_linear_kernel", "_linear_backward_kernel"])
def test_general_products(kernel, case, dtype, m, capability):
    if dtype == "fp32" and m > 1:
        pytest.skip("fp32 has one configuration")
    if kernel == "_linear_kernel" and dtype == "bf16" and case == "aligned":
        pytest.skip("_linear_words_kernel does these")
    blocksize, aligned = GENERAL[case]
    found, code, _ = product(
        kernel,
        capability,
        m,
        dtype,
        "gemv" if m == 1 else "fused",
        blocksize=blocksize,
        aligned=aligned,
    )
    check(found, capability)
    if dtype == "fp32":
        assert has(code, "FFMA") and not has(
            code, "HMMA", "HGMMA", r"UTC\w*MMA"
        )  # exact fp32, no TF32
    else:
        assert has(code, "HMMA", "HGMMA", r"UTC\w*MMA")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_quantize(dtype, blocksize, capability):
    pointers = {
        "weight_ptr": dtype,
        "thresholds_ptr": "fp32",
        "order_ptr": "u8",
        "packed_ptr": "u8",
        "absmax_ptr": "fp32",
    }
    constants = {"BLOCKSIZE": blocksize, "BLOCKS": max(1, 2048 // blocksize)}
    found, _ = other("_quantize_kernel", capability, pointers, ("numel",), constants, 4)
    check(found, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_quantize_scales(capability):
    pointers = {
        "absmax_ptr": "fp32",
        "offset_ptr": "fp32",
        "thresholds_ptr": "fp32",
        "codes_ptr": "u8",
        "nested_absmax_ptr": "fp32",
    }
    found, _ = other("_quantize_scales_kernel", capability, pointers, (), {"BLOCK": 256}, 2)
    check(found, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "nested", "blocksize"),
    [("bf16", True, 64), ("fp16", False, 4096), ("fp32", True, 32)],
)
def test_dequantize(dtype, nested, blocksize, aligned, capability):
    pointers = {**WEIGHT, "absmax_ptr": "u8" if nested else "fp32", "out_ptr": dtype}
    constants = {
        "BLOCK": max(blocksize, 2048),
        "BLOCKSIZE": blocksize,
        "NESTED": nested,
        "ALIGNED": aligned,
    }
    integers = ("start", "length", "stride") if aligned else ()
    found, code = other("_dequantize_kernel", capability, pointers, integers, constants, 4)
    check(found, capability)
    # The two roundings of a nested scale stay two: its one FMA would be the only one of the kernel's floats.
    assert not has(code, "FFMA")
    if aligned and dtype != "fp32":
        assert has(code, r"STG\.E\.128")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sum(capability):
    pointers = {"parts_ptr": "fp32", "bias_ptr": "bf16", "y_ptr": "bf16"}
    found, _ = other(
        "_sum_kernel",
        capability,
        pointers,
        ("numel",),
        {"SPLITS": 8, "HAS_BIAS": True, "BLOCK": 1024},
        4,
    )
    check(found, capability)
