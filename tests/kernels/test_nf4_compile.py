"""NF4's kernels, in the configurations of their launchers, compiled for three GPUs without a GPU.

For sm_80, sm_90 and sm_100 the compiler tells that nothing spills, that shared memory fits, that
tensor cores are used where they are claimed, and how many instructions the main loop spends on a
weight, which at M <= 16 caps the bandwidth. The bounds are the counts of Triton 3.6 and 3.9 plus a
small margin.

Not every combination is compiled. Each constexpr branch of each kernel is compiled for each
capability, and so are the tile shapes with the most registers and the most shared memory of each
regime. What only picks one of several loads is spread over those.
"""

import pytest
import torch
from helpers import triton_build
from helpers.triton_build import (
    Build,
    every_capability,
    has,
    has_atomics,
    has_tensor_cores,
    main_loop,
    sass,
)

from pyfast.kernels import _split_sums, nf4, nf4_linear
from pyfast.kernels._launch import FUSED

pytestmark = pytest.mark.needs("compiler")
# pytest finds fixtures in the module of a test.
checked = triton_build.checked
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------- configurations


def weight(nested):
    """Return the types of a weight's pointers; unless nested, the last three go unused."""
    names = ("code_ptr", "nested_absmax_ptr", "nested_code_ptr", "offset_ptr")
    return {
        "packed_ptr": "u8",
        "absmax_ptr": "u8" if nested else "fp32",
        **dict.fromkeys(names, "fp32"),
    }


def product(
    kernel,
    dtype,
    m,
    *,
    nested,
    bias=False,
    blocksize=64,
    aligned=True,
    paired=False,
    splits=False,
    k=4096,
):
    """Return (id, capability -> Build) of a product's kernel, as its launcher configures it."""
    op, path = kernel.removeprefix("nf4_").removesuffix("_kernel"), "gemv" if m <= 16 else "fused"
    pointers = weight(nested)
    constants = {"BLOCKSIZE": blocksize, "NESTED": nested}
    out = "fp32" if splits else dtype
    if op == "linear_backward":
        pointers |= {"dy_ptr": dtype, "dx_ptr": out}
    else:
        pointers |= {"x_ptr": dtype, "bias_ptr": dtype, "y_ptr": out}
        constants |= {"HAS_BIAS": bias}
    if op == "linear_words":
        constants |= {"ASM": True}
    else:
        constants |= {"ALIGNED": aligned} | ({"PAIRED": paired} if op == "linear" else {})

    def make(capability):
        config = nf4_linear.tile_config(
            op, path, m, k, TYPES[dtype], blocksize, divmod(capability, 10)
        )
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")} | FUSED
        items = (tuple(d.items()) for d in (pointers, constants | config, options))
        return Build(capability, f"nf4_linear.{kernel}", *items, ("n", "k") if aligned else ())

    words = {"nested": nested, "bias": bias, "any": not aligned, "paired": paired, "splits": splits}
    name = "-".join(
        [op, dtype, f"M{m}", f"block{blocksize}", f"K{k}", *(word for word in words if words[word])]
    )
    return name, make


def other(name, kernel, pointers, constants, num_warps, aligned=()):
    """Return (id, capability -> Build) of a kernel whose launcher asks for no fusion into FMAs."""
    options = (("num_warps", num_warps), ("enable_fp_fusion", False))
    items = tuple(pointers.items()), tuple(constants.items())
    module = "nf4" if hasattr(nf4, kernel) else "_split_sums"
    return name, lambda capability: Build(
        capability, f"{module}.{kernel}", *items, options, aligned
    )


# ---------------------------------------------------------------- products

# SASS instructions of the main loop for a weight, by capability and tile of M: what the compiler
# gives today, and a little more.
PER_WEIGHT = {
    80: {8: 4.3, 16: 4.6, 32: 5.8, 64: 6.6, 128: 12.0},
    90: {8: 4.3, 16: 4.6, 32: 5.5, 64: 6.1, 128: 10.0},
    100: {8: 4.7, 16: 5.0, 32: 6.8, 64: 7.3},
}
WORDS = "nf4_linear_words_kernel"
# These are all tiles of tile_config, in bf16 with all that costs registers (nested scales, bias),
# and the largest gemv and fused ones in fp16 without. The blocksize only moves an address, so the
# largest stands for those above 64.
WORDS_CASES = [product(WORDS, "bf16", m, nested=True, bias=True) for m in (1, 16, 32, 64, 128)]
WORDS_CASES += [product(WORDS, "fp16", m, nested=False, splits=True) for m in (16, 128)]
WORDS_CASES += [
    product(WORDS, "bf16", 1, nested=True, bias=True, blocksize=4096),
    # BK is 64, because k is not a multiple of 128.
    product(WORDS, "bf16", 1, nested=True, bias=True, k=4160),
]


@every_capability(WORDS_CASES)
def test_linear_words_spends_few_instructions_on_a_weight(build, checked):
    config = dict(build.constants) | dict(build.options)
    # Two warps cannot form the warpgroup that wgmma and tcgen05 need. Up to M = 16, all use
    # mma.sync.
    warpgroup = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
    assert has(checked, "HMMA" if config["num_warps"] == 2 else warpgroup[build.capability])
    weights = config["BN"] * config["BK"] / (32 * config["num_warps"])
    per_weight = len(main_loop(sass(checked))) / weights
    assert per_weight <= PER_WEIGHT[build.capability][config["BM"]]


LINEAR, BACKWARD = "nf4_linear_kernel", "nf4_linear_backward_kernel"
GENERAL = [
    product(LINEAR, "bf16", 1, nested=True, bias=True, aligned=False),
    product(LINEAR, "bf16", 64, nested=False, splits=True, aligned=False, paired=True),
    product(LINEAR, "fp16", 1, nested=False, splits=True, blocksize=32, paired=True),
    product(LINEAR, "bf16", 64, nested=True, bias=True, blocksize=32, paired=True),
    # x is not 4-byte aligned.
    product(LINEAR, "bf16", 64, nested=True, bias=True),
    product(LINEAR, "fp32", 1, nested=True, bias=True),
    product(LINEAR, "fp32", 1, nested=True, bias=True, aligned=False),
    product(BACKWARD, "bf16", 1, nested=True),
    product(BACKWARD, "bf16", 64, nested=True),
    product(BACKWARD, "fp16", 64, nested=False, splits=True),
    product(BACKWARD, "fp16", 1, nested=False, splits=True, aligned=False),
    product(BACKWARD, "bf16", 64, nested=True, aligned=False),
    product(BACKWARD, "bf16", 64, nested=True, blocksize=32),
    product(BACKWARD, "fp32", 1, nested=True),
    product(BACKWARD, "fp32", 1, nested=True, aligned=False),
]


@every_capability(GENERAL)
def test_general_products_use_tensor_cores_unless_in_fp32(build, checked):
    tensor_cores = has_tensor_cores(checked)
    if "fp32" in (dict(build.pointers).get("x_ptr"), dict(build.pointers).get("dy_ptr")):
        # fp32 is fp32, not TF32.
        assert "fma.rn.f32" in checked.ptx and not tensor_cores
    else:
        assert tensor_cores


SUM = {"parts_ptr": "fp32", "bias_ptr": "bf16", "y_ptr": "bf16"}


@every_capability(
    other(
        f"{splits}-bias" if bias else str(splits),
        "sum_parts_kernel",
        SUM,
        {"SPLITS": splits, "HAS_BIAS": bias, "BLOCK": _split_sums.SUM_TILE},
        4,
        ("numel",),
    )
    for splits, bias in ((16, True), (2, False))
)
def test_sum_of_parts_uses_no_atomics(checked):
    # Without atomics the order of the sum is fixed.
    assert not has_atomics(checked)


# ---------------------------------------------------------------- quantize, dequantize

TABLES = {"thresholds_ptr": "fp32", "order_ptr": "u8"}
QUANTIZED = {"packed_ptr": "u8", "absmax_ptr": "fp32"}


# The type is only that of one load; the blocksize is the shape of everything.
@every_capability(
    other(
        f"{dtype}-{blocksize}",
        "nf4_quantize_kernel",
        {"weight_ptr": dtype, **TABLES, **QUANTIZED},
        {"BLOCKSIZE": blocksize, "BLOCKS": max(1, nf4.QUANTIZE_TILE // blocksize)},
        4,
        ("numel",),
    )
    for dtype, blocksize in (("fp32", 32), ("bf16", 64), ("fp16", 4096))
)
def test_quantize_compiles_to_a_kernel_that_stores(checked):
    assert "st.global" in checked.ptx


SCALES = dict.fromkeys(("absmax_ptr", "offset_ptr", "thresholds_ptr", "nested_absmax_ptr"), "fp32")


@every_capability(
    [
        other(
            "256",
            "nf4_quantize_scales_kernel",
            {**SCALES, "codes_ptr": "u8"},
            {"BLOCK": nf4.NESTED_BLOCK},
            2,
        )
    ]
)
def test_quantize_scales_compiles_to_a_kernel_that_stores(checked):
    assert "st.global" in checked.ptx


@every_capability(
    other(
        f"{dtype}-{blocksize}-{'nested' if nested else 'plain'}-{'aligned' if aligned else 'any'}",
        "nf4_dequantize_kernel",
        {**weight(nested), "out_ptr": dtype},
        {
            "BLOCK": max(blocksize, nf4.DEQUANTIZE_TILE[aligned]),
            "BLOCKSIZE": blocksize,
            "NESTED": nested,
            "ALIGNED": aligned,
        },
        4,
        ("start", "length", "stride") if aligned else (),
    )
    for dtype, nested, blocksize in (("bf16", True, 64), ("fp16", False, 4096), ("fp32", True, 32))
    for aligned in (True, False)
)
def test_dequantize_fuses_no_roundings_and_stores_128_bits(build, checked):
    # The two roundings of a nested scale stay two. An FMA would be the only one of the kernel.
    assert "fma.rn" not in checked.ptx
    if dict(build.constants)["ALIGNED"] and dict(build.pointers)["out_ptr"] != "fp32":
        assert "st.global.v4.b32" in checked.ptx
