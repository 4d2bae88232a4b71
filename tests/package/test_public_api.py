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
    assert all(hasattr(pyfast, name) for name in pyfast.__all__)


def test_registered_ops_are_these():
    assert all(hasattr(torch.ops.pyfast, name) for name in OPS.split())


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
