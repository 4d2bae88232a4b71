"""The adapter's kernels, as their launchers configure them, compiled without a GPU, as test_triton_compile.py does."""

import pytest
import torch
import triton_build
from triton_build import Build, every_capability, has

from pyfast.kernels import adapter

pytestmark = pytest.mark.needs("compiler")
checked = triton_build.checked  # pytest finds fixtures in a module
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ("m", "into", "bottleneck", "out")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh")


def case(kernel, dtype, m, bottleneck, activation="gelu", weights=None):
    names = {
        "adapter": ("x", "down", "down_bias", "up", "up_bias", "residual", "y"),
        "hidden": ("x", "down", "down_bias", "dy", "up", "h", "dz"),
    }[kernel]
    flags = {
        "adapter": ("HAS_DOWN_BIAS", "HAS_UP_BIAS"),
        "hidden": ("HAS_DOWN_BIAS", "WRITE_H", "WRITE_DZ"),
    }[kernel]
    pointers = {f"{name}_ptr": weights or dtype if name.startswith(("down", "up")) else dtype for name in names}
    constants = {"ACTIVATION": activation, **dict.fromkeys(flags, True)}
    name = f"{kernel}-{dtype}-M{m}-b{bottleneck}-{activation}" + (f"-{weights}" if weights else "")
    return name, build(f"_{kernel}_kernel", kernel, pointers, constants, dtype, m, bottleneck, SIZES)


def product(dtype, what, c=None):
    """A product by what it is for, with the strides of 1 that it has."""
    pointers = {f"{name}_ptr": dtype for name in ("a", "b", "bias", "residual")} | {"c_ptr": c or dtype}
    ones, flags = {
        "up": (("a_col", "b_row"), ("HAS_BIAS", "HAS_RESIDUAL")),
        "dx": (("a_col", "b_col"), ("HAS_RESIDUAL",)),
        "weights": (("a_row", "b_col"), ()),
    }[what]
    constants = dict.fromkeys(ones, 1) | {flag: flag in flags for flag in ("HAS_BIAS", "HAS_RESIDUAL")}
    constants["T"] = {"fp32": adapter.tl.float32, "bf16": adapter.tl.bfloat16, "fp16": adapter.tl.float16}[dtype]
    aligned = [name for name in ("m", "n", "k", "a_row", "a_col", "b_row", "b_col") if name not in ones]
    name = f"product-{dtype}-{what}"
    return name, build("_product_kernel", "product", pointers, constants, dtype, 4096, 64, tuple(aligned))


def build(kernel, config_name, pointers, constants, dtype, m, bottleneck, aligned):
    config = adapter.tile_config(config_name, m, bottleneck, TYPES[dtype])
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")} | adapter.OPTIONS
    items = tuple(tuple(d.items()) for d in (pointers, constants | config, options))
    floats = ("scaling",) if "scaling" in getattr(adapter, kernel).arg_names else ()
    return lambda capability: Build(capability, f"adapter.{kernel}", *items, aligned, floats)


# The widest tiles of each type with the costliest activation; each activation once; the narrowest; fp32 parameters.
CASES = [
    *(
        case(kernel, dtype, m, 128)
        for kernel in ("adapter", "hidden")
        for dtype in ("bf16", "fp32")
        for m in (512, 8192)
    ),
    *(case("hidden", "fp16", 8192, 64, activation) for activation in ACTIVATIONS if activation != "gelu"),
    case("adapter", "fp16", 1, 16, "relu"),
    case("adapter", "bf16", 8192, 128, weights="fp32"),
    *(product(dtype, what) for dtype in ("bf16", "fp32") for what in ("up", "dx", "weights")),
    product("fp16", "weights", c="fp32"),
]


@every_capability(CASES)
def test_adapter(build, checked):
    exact = dict(build.pointers).get("x_ptr", dict(build.pointers).get("a_ptr")) == "fp32"
    tensor_cores = has(checked, "HMMA", "HGMMA", r"UTC\w*MMA")
    assert tensor_cores != exact  # fp32 is fp32, no TF32
    assert not has(checked, r"RED\.E", "ATOMG")  # the sums' order is fixed
