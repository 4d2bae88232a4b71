"""The error that docs/precision.md gives for rounding the scaled code table in place of each weight."""

import re
from pathlib import Path

import pytest
import torch

from pyfast.formats import nf4_codebooks

ROOT = Path(__file__).parents[2]


def code_gains() -> dict[torch.dtype, float]:
    """Return the factors on NF4's codes, read from the source, since code_gain runs on a GPU only."""
    source = (ROOT / "kernels/nf4_decode.py").read_text()
    bf16, fp16 = re.search(r"nf4 = ([\d.]+) if T.is_bf16\(\) else ([\d.]+)\n", source).groups()
    return {torch.bfloat16: float(bf16), torch.float16: float(fp16)}


@pytest.mark.parametrize(
    ("dtype", "table_error", "weight_error"),
    [(torch.bfloat16, 1.3e-3, 1.7e-3), (torch.float16, 1.4e-4, 2.1e-4)],
    ids=str,
)
def test_rounding_the_code_table_errs_less_than_rounding_each_weight(
    dtype, table_error, weight_error
):
    """Weights are normally distributed, in blocks of 64; errors are root mean squares."""
    gain = code_gains()[dtype]
    code, thresholds = nf4_codebooks.CODE["nf4"], nf4_codebooks.THRESHOLDS["nf4"]
    weight = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    absmax = weight.abs().amax(1, keepdim=True)
    nibble = torch.bucketize(weight / absmax, thresholds)
    exact = (code[nibble] * absmax).double()

    table = (code * gain).to(dtype).double() / gain
    errors = {"table": table[nibble] * absmax, "weight": exact.to(dtype).double()}
    relative = {name: (w - exact).norm() / exact.norm() for name, w in errors.items()}
    assert relative["table"] == pytest.approx(table_error, rel=0.04)
    assert relative["weight"] == pytest.approx(weight_error, rel=0.04)


def test_the_page_gives_these_errors():
    page = (ROOT / "docs/precision.md").read_text()
    assert "errs by 1.3e-3 (root mean square) in bf16" in page
    assert "rounding each weight errs by 1.7e-3" in page
    assert "tests/formats/test_nf4_rounding.py" in page
