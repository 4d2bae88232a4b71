"""The public names, frozen; what their docstrings must hold; docs/api.md, which is made of these."""

import doctest
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pyfast
import pyfast.hf
from pyfast._support import registry

ROOT = Path(__file__).parents[2]
PUBLIC = """
    Adapter AdapterConfig CheckpointError ChunkedFeedForward LSHCache LSHSelfAttention LSH_PRESETS LoRAConfig LoRALinear
    LocalCache LocalSelfAttention NF4Linear NF4Weight Projection Reformer ReformerCache ReformerConfig
    ReversibleSequence adapter add_adapters add_lora chunked_cross_entropy chunked_feed_forward load_adapter
    local_attention lora_linear lora_linears lsh_attention lsh_buckets merge mixed_batch multi_lora_linear
    nf4_dequantize nf4_linear nf4_quantize quantize reference remove_adapter reversible row_squares save_adapter
    select set_adapter summary unmerge
"""
HF = "NF4Config Patched load_quantized patch unpatch"
OPS = """
    adapter adapter_backward chunked_cross_entropy lora_expand_backward lora_linear lora_linear_backward
    lora_row_squares lora_shrink lora_shrink_backward lsh_attention lsh_attention_backward lsh_hash lsh_rotations
    lsh_sort nf4_dequantize nf4_linear nf4_linear_backward nf4_quantize reversible_step
"""
REFERENCE = """
    ACTIVATIONS adapter adapter_backward_op adapter_op check_finite chunked_cross_entropy chunked_feed_forward
    dropout_mask dropout_threshold lora_expand_backward_op lora_linear lora_linear_backward_op lora_linear_op
    lora_row_squares_op lora_shrink_backward_op lora_shrink_op lsh_attention lsh_attention_backward_op
    lsh_attention_op lsh_buckets lsh_hash_op lsh_rotations_op lsh_sort_op mean_absmax multi_lora_linear
    nf4_dequantize nf4_dequantize_op nf4_linear nf4_linear_backward_op nf4_linear_op nf4_quantize nf4_quantize_op
    nf4_values philox reversible reversible_step_op
"""
# Users pass these by name and by position, so neither a name nor the order changes.
PARAMETERS = {
    "Adapter": (
        "width bottleneck reduction activation scaling dropout bias layer_norm_before "
        "layer_norm_after init dtype device"
    ),
    "AdapterConfig": "bottleneck style targets activation scaling dropout modules_to_save dtype",
    "ChunkedFeedForward": "ff chunk dim",
    "LSHCache": "max_length",
    "LSHSelfAttention": (
        "width heads head_dim n_hashes chunk_length n_buckets causal preset separate_keys "
        "value_heads bias out_bias dropout hash_seed dtype device choices"
    ),
    "LoRAConfig": (
        "r alpha targets exclude dropout dora rslora lora_bias bias init rank_pattern "
        "alpha_pattern modules_to_save layers_to_transform layers_pattern dtype task_type "
        "share_inputs"
    ),
    "LoRALinear": "base",
    "LocalCache": "",
    "LocalSelfAttention": "width heads head_dim chunk_length bias out_bias dropout dtype device",
    "NF4Linear": "in_features out_features bias blocksize nested quant_type dtype device",
    "NF4Weight": (
        "packed absmax code shape blocksize dtype quant_type nested_absmax nested_code offset"
    ),
    "Projection": "weight lora_a lora_b scaling bias lora_bias magnitude row_squares",
    "Reformer": "config",
    "ReformerCache": "model max_length",
    "ReformerConfig": (
        "vocab_size width layers heads head_dim hidden activation max_length positions "
        "axial_shape axial_widths n_hashes n_buckets lsh_chunk local_chunk preset hash_seed "
        "dropout lsh_dropout local_dropout tied head_bias norm_eps exact fraction_bits store "
        "feed_forward_chunk init_std pad_to pad_id end_id"
    ),
    "ReversibleSequence": "blocks exact fraction_bits store",
    "adapter": "x down_weight down_bias up_weight up_bias activation scaling residual",
    "add_adapters": "model config name",
    "add_lora": "model config name",
    "chunked_cross_entropy": "hidden weight labels bias chunk ignore_index reduction",
    "chunked_feed_forward": "ff x chunk dim",
    "load_adapter": "model directory name trainable",
    "local_attention": "q k v chunk_length key_padding_mask dropout_p seed",
    "lora_linear": "x weight lora_a lora_b scaling bias lora_bias dropout_p seed magnitude",
    "lora_linears": "x projections dropout_p seeds",
    "lsh_attention": (
        "qk v k n_hashes chunk_length n_buckets causal preset key_padding_mask dropout_p seed "
        "rotations buckets return_lse return_buckets scale key_norm same_bucket "
        "correct_duplicates wrap pad_bucket mask_queries attend_self"
    ),
    "lsh_buckets": "qk n_hashes n_buckets seed rotations key_padding_mask",
    "merge": "model into unwrap",
    "mixed_batch": "model adapter_ids",
    "multi_lora_linear": "x weight lora_a lora_b adapter_ids scaling bias",
    "nf4_dequantize": "w dtype",
    "nf4_linear": "x w bias",
    "nf4_quantize": "weight blocksize nested quant_type",
    "quantize": "model targets skip blocksize nested quant_type",
    "remove_adapter": "model name",
    "reversible": (
        "blocks x1 x2 args exact fraction_bits store return_hidden f_kwargs g_kwargs kwargs"
    ),
    "row_squares": "weight",
    "save_adapter": "model directory name",
    "select": "model patterns",
    "set_adapter": "model name",
    "summary": "model",
    "unmerge": "model",
    "hf.NF4Config": "blocksize nested quant_type skip quant_method",
    "hf.Patched": "lora linear4bit left",
    "hf.load_quantized": "directory model_class dtype device config strict allow_pickle options",
    "hf.patch": "model",
    "hf.unpatch": "model",
}
NAMES = [name for name in PUBLIC.split() if name not in ("LSH_PRESETS", "reference")]
NAMES += [f"hf.{name}" for name in HF.split()]


def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_are_these():
    assert sorted(pyfast.__all__) == sorted(PUBLIC.split())
    assert sorted(pyfast.hf.__all__) == sorted(HF.split())
    assert sorted(pyfast.reference.__all__) == sorted(REFERENCE.split())
    for package in (pyfast, pyfast.hf, pyfast.reference):
        assert all(hasattr(package, name) for name in package.__all__)


def test_registered_ops_are_these():
    """chunked_cross_entropy is made of torch's ops on every device, so it has no kernel."""
    assert sorted([*registry.registered(), "chunked_cross_entropy"]) == sorted(OPS.split())
    assert all(hasattr(torch.ops.pyfast, name) for name in OPS.split())


def test_parameters_are_these():
    public = {name: make_api().public(name) for name in NAMES}
    parameters = {
        name: " ".join(inspect.signature(value).parameters)
        for name, value in public.items()
        if not (inspect.isclass(value) and issubclass(value, Exception))
    }
    assert parameters == PARAMETERS


def test_the_page_of_the_api_has_a_heading_for_each_name():
    titles = [
        line[4:] for line in (ROOT / "docs/api.md").read_text().splitlines() if line[:4] == "### "
    ]
    expected = [*PUBLIC.split(), *(f"hf.{name}" for name in HF.split())]
    assert sorted(titles) == sorted(expected)


def test_the_page_of_the_api_is_made_of_the_docstrings():
    assert make_api().main(["--check"]) == 0, "run `python docs/make_api.py`"


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_says_what_comes_back_and_shows_an_example(name, tmp_path, monkeypatch):
    """Examples run here; they may write files where they are."""
    monkeypatch.chdir(tmp_path)
    value = make_api().public(name)
    parts = make_api().sections(value)
    first = parts[""].splitlines()[0]
    assert first.endswith(".") and len(first) <= 97, first
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    silent = (None, Iterator[None])  # the second is that of a context manager
    is_silent = inspect.isclass(value) or inspect.signature(value).return_annotation in silent
    assert is_silent or {"Returns", "Yields"} & set(parts), f"{name} has no Returns"
    parameters = set(inspect.signature(value).parameters) - {"args", "kwargs", "options"}
    if not inspect.isclass(value):
        missing = [p for p in parameters if p not in parts.get("Args", "")]
        assert not missing, f"{name}: Args says nothing of {missing}"
    examples = doctest.DocTestParser().get_examples(parts.get("Example", ""))
    lines = sum(len(example.source.splitlines()) for example in examples)
    assert 2 <= lines <= 9, f"{name}: an example of {lines} lines"
    test = doctest.DocTest(
        examples, {"torch": torch, "nn": nn, "pyfast": pyfast}, name, None, None, None
    )
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
