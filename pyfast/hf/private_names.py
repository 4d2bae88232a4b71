"""Private or undocumented names of other libraries that pyfast.hf relies on.

A new version of a library may change them. A test fails when a name is gone or means something
else. The versions are those that the tests have passed with.
"""

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A name, the module of the peer library that has it, its use here, and the test of the use."""

    module: str
    name: str
    versions: str
    used_in: tuple[str, ...]
    used_for: str
    test: str


PRIVATE_NAMES = (
    PrivateName(
        "accelerate.hooks",
        "_old_forward",
        "accelerate 1.15.0",
        ("pyfast/hf/patching.py",),
        "the forward that accelerate's hooks call must be that of the new class",
        "tests/hf/test_patching_api.py::test_hooks_of_accelerate_call_the_new_forward",
    ),
    PrivateName(
        "accelerate.hooks",
        "_hf_hook",
        "accelerate 1.15.0",
        ("pyfast/nn/linear_layers.py",),
        "the device that a layer of offloaded weights computes on",
        "tests/hf/test_transformers.py::test_adapters_over_offloaded_weights_compute_the_same",
    ),
    PrivateName(
        "peft.tuners.lora.layer",
        "lora_variant",
        "PEFT 0.21.0",
        ("pyfast/hf/peft_lora.py",),
        "the variant of an adapter: none is plain LoRA",
        "tests/hf/test_patching_api.py::test_other_variants_run_as_peft_s",
    ),
    PrivateName(
        "peft.tuners.lora.variants",
        "DoraLinearVariant",
        "PEFT 0.21.0",
        ("pyfast/hf/peft_lora.py",),
        "the variant that pyfast computes itself; all others run as PEFT's",
        "tests/hf/test_patching.py::test_dense_layers_compute_as_peft_s",
    ),
    PrivateName(
        "bitsandbytes.functional",
        "packing_format_for_cpu",
        "bitsandbytes 0.50.2",
        ("pyfast/hf/bitsandbytes_layers.py",),
        "whether bitsandbytes' eval has repacked a weight on a CPU",
        "tests/hf/test_patching_api.py::test_weights_that_bitsandbytes_repacked_are_unpacked",
    ),
    PrivateName(
        "bitsandbytes.functional",
        "_convert_weight_packed_for_cpu_inverse",
        "bitsandbytes 0.50.2",
        ("pyfast/hf/bitsandbytes_layers.py",),
        "unpacks such a weight",
        "tests/hf/test_patching_api.py::test_weights_that_bitsandbytes_repacked_are_unpacked",
    ),
    PrivateName(
        "transformers.quantizers.base",
        "_process_model_before_weight_loading",
        "transformers 5.24.0",
        ("pyfast/hf/quantizer.py",),
        "chooses the layers to quantize",
        "tests/hf/test_transformers.py::test_from_pretrained_and_save_pretrained_agree",
    ),
    PrivateName(
        "transformers.quantizers.base",
        "_process_model_after_weight_loading",
        "transformers 5.24.0",
        ("pyfast/hf/quantizer.py",),
        "has a loaded model saved with the entries that it was loaded from",
        "tests/hf/test_transformers.py::test_from_pretrained_and_save_pretrained_agree",
    ),
    PrivateName(
        "transformers.quantizers.base",
        "_dequantize",
        "transformers 5.24.0",
        ("pyfast/hf/quantizer.py",),
        "the work of `model.dequantize()`",
        "tests/hf/test_transformers.py::test_from_pretrained_and_save_pretrained_agree",
    ),
    PrivateName(
        "transformers.modeling_utils",
        "_keep_in_fp32_modules",
        "transformers 5.24.0",
        ("pyfast/hf/quantizer.py", "pyfast/adapters/quantization.py"),
        "layers that a model wants in float32, and that are therefore not quantized",
        "tests/hf/test_transformers.py::test_from_pretrained_and_save_pretrained_agree",
    ),
    PrivateName(
        "transformers.modeling_utils",
        "all_tied_weights_keys",
        "transformers 5.24.0",
        ("pyfast/hf/quantizer.py",),
        "weights that share memory, and that are therefore not quantized",
        "tests/hf/test_loading.py::test_tied_weights_are_tied",
    ),
    PrivateName(
        "transformers.core_model_loading",
        "_weight_conversions",
        "transformers 5.24.0",
        ("pyfast/hf/quantizer.py",),
        "conversions that saving would undo",
        "tests/hf/test_transformers.py::test_from_pretrained_and_save_pretrained_agree",
    ),
    PrivateName(
        "transformers.initialization",
        "_is_hf_initialized",
        "transformers 5.24.0",
        ("pyfast/hf/quantizer.py",),
        "parameters that have values, and must not be initialized",
        "tests/hf/test_loading.py::test_loaded_is_what_is_quantized_in_memory",
    ),
)
