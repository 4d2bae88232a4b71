"""The Triton kernels of NF4 against the definition in plain PyTorch.

On a machine with a GPU the tests run on it. On any other they need the interpreter, which has to be
chosen before triton is imported: `TRITON_INTERPRET=1 pytest tests/kernels/test_nf4_triton.py`. A
plain `pytest` run does just that, in two tests. The interpreter does not show races, layouts, bf16
products or speed.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from helpers.triton_inputs import DEVICE, DTYPES, GPU, native, random, random_state
from helpers.triton_interpreter import assert_passes

from pyfast import reference
from pyfast._support import registry
from pyfast.formats import nf4_codebooks
from pyfast.kernels import nf4, nf4_linear
from pyfast.kernels.nf4_decode import DECODE, code_gain

BLOCKSIZES = [32, 64, 128, 4096]
PATHS = ["gemv", "fused", "panel"]
CODE = nf4_codebooks.CODE["nf4"]
THRESHOLDS = (CODE[1:] + CODE[:-1]) / 2
# A random order, so that a kernel that ignores it fails.
ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(5)).to(torch.uint8)


@pytest.mark.long
@pytest.mark.needs("no kernels")
@pytest.mark.parametrize("name", ["nf4", "lora"])
def test_the_kernels_are_right_in_the_interpreter(name):
    """NF4's tests and LoRA's run there."""
    assert_passes(f"kernels/test_{name}_triton.py")


def definition(state, shape, blocksize):
    """Return the weight in fp32, on the CPU."""
    return reference.nf4_values([t.cpu() for t in state], shape, blocksize)


def assert_product(y, x, w, bias=None):
    """Assert that y is about as exact as the product with a weight rounded once to x's dtype.

    Its error against float64 is at most the error of that product, and eps.
    """
    exact = x.double().cpu() @ w.double()
    rounded = x.double().cpu() @ w.to(x.dtype).double()
    if bias is not None:
        exact, rounded = exact + bias.double().cpu(), rounded + bias.double().cpu()
    size = (x.double().cpu().abs() @ w.double().abs()).max().clamp_min(1e-30)
    eps = torch.finfo(x.dtype).eps
    allowed = (rounded - exact).abs().max() + eps * exact.abs().max() + 2**-20 * size
    assert (y.double().cpu() - exact).abs().max() <= allowed


# ---------------------------------------------------------------- quantize


def encode(weight, blocksize):
    """Return (packed, absmax) by the specification's rule, block by block."""
    v = weight.flatten().float().cpu()
    numel, short = v.numel(), v.numel() % blocksize
    v = torch.cat([v, v.new_zeros(-v.numel() % blocksize)]).view(-1, blocksize)
    absmax = v.abs().amax(1)
    floor = absmax.clamp_min(1e-38)
    x = v * (1 / floor)[:, None]
    if short:
        x[-1], absmax[-1] = v[-1] / floor[-1], floor[-1]
    nibble = ORDER[(x[..., None] > THRESHOLDS).sum(-1)].flatten()[: numel + numel % 2]
    return (nibble[0::2] << 4 | nibble[1::2])[:, None], absmax


def quantize(weight, blocksize):
    """Return (packed, absmax) of the kernel, on the CPU."""
    packed, absmax = nf4.quantize(
        weight.to(DEVICE), THRESHOLDS.to(DEVICE), ORDER.to(DEVICE), blocksize
    )
    return packed.cpu(), absmax.cpu()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("numel", [1, 31, 64, 1025, 8192, 12289])
def test_quantize_equals_the_specification(numel, blocksize, dtype):
    weight = random(numel, seed=numel).cpu().to(dtype)
    weight[numel // 3 : numel // 3 + 100] = 0
    packed, absmax = quantize(weight, blocksize)
    expected_packed, expected_absmax = encode(weight, blocksize)
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(packed, expected_packed)


@native
@pytest.mark.parametrize("numel", [64, 65, 3])
def test_quantize_equals_the_specification_for_zero_tiny_and_huge(numel):
    for value in (0.0, -0.0, 1e-39, -1e-42, 3e38):
        weight = torch.full((numel,), value)
        for result, expected in zip(quantize(weight, 64), encode(weight, 64)):
            assert torch.equal(result, expected)


@native
def test_quantize_divides_in_a_short_block_only():
    """The same values stand in a whole and in a short block.

    v * (1 / absmax) and v / absmax lie on either side of a threshold.
    """
    absmax = torch.rand(4000, generator=torch.Generator().manual_seed(3)) + 0.5
    v = absmax * THRESHOLDS[9]
    apart = (v / absmax > THRESHOLDS[9]) != (v * (1 / absmax) > THRESHOLDS[9])
    assert apart.sum() >= 3
    for a, b in zip(absmax[apart][:3], v[apart]):
        block = torch.cat([a.view(1), b.expand(63)])
        weight = torch.cat([block, block[:40]])
        packed, scales = quantize(weight, 64)
        expected = encode(weight, 64)
        assert torch.equal(packed, expected[0]) and torch.equal(scales, expected[1])
        assert packed[1] != packed[33]


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_in_their_block(bad):
    weight = random(300).cpu()
    weight[[70, 290]] = bad
    packed, absmax = quantize(weight, 64)
    assert absmax.isfinite().tolist() == [True, False, True, True, False]
    weight[[70, 290]] = 0
    expected = encode(weight, 64)
    assert torch.equal(packed[:32], expected[0][:32]) and torch.equal(
        packed[64:128], expected[0][64:128]
    )


@native
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 1000])
def test_quantize_scales_equals_the_specification(blocks):
    thresholds = random(255, seed=9).sort().values
    absmax = random(blocks, seed=blocks).abs()
    offset = absmax.mean().reshape(1)
    # This makes a block of zeros.
    absmax[256:512] = offset
    codes, nested = nf4.quantize_scales(absmax, offset, thresholds)
    d = (absmax - offset).cpu()
    d = torch.cat([d, d.new_zeros(-blocks % 256)]).view(-1, 256)
    expected = d.abs().amax(1)
    rank = ((d * (1 / expected)[:, None])[..., None] > thresholds.cpu()).sum(-1)
    rank[expected == 0] = 0
    assert torch.equal(nested.cpu(), expected)
    assert torch.equal(codes.cpu(), rank.flatten()[:blocks].to(torch.uint8))


# ---------------------------------------------------------------- dequantize


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 64), (33, 257), (5, 4096)], ids=str)
def test_dequantize_equals_the_definition(shape, blocksize, nested, dtype):
    state = random_state(shape, blocksize, nested)
    expected = definition(state, shape, blocksize).to(dtype)
    assert torch.equal(nf4.dequantize(state, shape, blocksize, dtype).cpu(), expected)
    n, k = shape
    for first, last in ((0, 1), (n // 2, n), (n - 1, n), (0, 0)):
        rows = torch.empty(last - first, k, dtype=dtype, device=DEVICE)
        out = nf4.dequantize_segments(state, blocksize, rows, first * k, 1, rows.numel(), 0)
        assert out is rows
        assert torch.equal(rows.cpu(), expected[first:last])
    columns = torch.empty(n, k - k // 2, dtype=dtype, device=DEVICE)
    nf4.dequantize_segments(state, blocksize, columns, k // 2, n, k - k // 2, k)
    assert torch.equal(columns.cpu(), expected[:, k // 2 :])


@native
@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (130,), (3, 5, 7), (2, 1, 64)], ids=str)
def test_dequantize_takes_any_shape(shape):
    state = random_state(shape, 64, True)
    expected = definition(state, shape, 64)
    values = nf4.dequantize(state, shape, 64, torch.float32)
    assert values.shape == shape and torch.equal(values.cpu(), expected)


# ---------------------------------------------------------------- multiply


# These are whole blocks, one tile and several, and rows that blocks straddle. Not all combinations
# are tested, because the interpreter takes a second for the largest. Every branch of the kernels
# has a case, both with 16 bits and with fp32.
SHAPES = [(40, 64), (33, 128), (70, 192), (7, 33), (65, 100), (1, 1)]
SHAPES += [(1000, 1024), (515, 4096), (777, 1111)] if GPU else []
# M, blocksize, nested, bias
CASES = [(1, 64, True, False), (3, 32, False, True), (17, 64, False, True)]
if GPU:
    CASES += [(3, 32, True, False), (8, 64, True, True)]
    CASES += [(16, 128, False, False), (17, 64, True, False)]


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("m", "blocksize", "nested", "has_bias"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right_in_both_directions(shape, m, blocksize, nested, has_bias, path, dtype):
    (n, k), state = shape, random_state(shape, blocksize, nested)
    w = definition(state, shape, blocksize)
    x, dy = random(m, k, dtype=dtype), random(m, n, dtype=dtype)
    bias = random(n, dtype=dtype, seed=2) if has_bias else None
    y = nf4_linear.linear(x, state, bias, shape, blocksize, path=path)
    dx = nf4_linear.linear_backward(dy, state, shape, blocksize, path=path)
    assert y.shape == (m, n) and dx.shape == (m, k) and y.dtype == dx.dtype == dtype
    assert_product(y, x, w.t(), bias)
    assert_product(dx, dy, w)


@native
@pytest.mark.parametrize("path", PATHS)
def test_no_rows_give_empty_results(path):
    state = random_state((40, 64), 64, True)
    assert nf4_linear.linear(random(0, 64), state, None, (40, 64), 64, path=path).shape == (0, 40)
    dx = nf4_linear.linear_backward(random(0, 40), state, (40, 64), 64, path=path)
    assert dx.shape == (0, 64)


# More than 32 rows and, in the 128-row tile, more than 128.
ROWS = [(torch.float32, 33), (torch.float16, 33), (torch.float16, 129)]
ROWS += [(dtype, m) for dtype in DTYPES for m in (129, 600, 1025)] if GPU else []


@native
@pytest.mark.parametrize(("dtype", "m"), ROWS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_blocksizes_and_many_rows_are_right(blocksize, path, dtype, m):
    shape = (48, 4096) if GPU else (48, 128)
    state = random_state(shape, blocksize, True)
    w = definition(state, shape, blocksize)
    x, dy = random(m, shape[1], dtype=dtype), random(m, shape[0], dtype=dtype)
    assert_product(nf4_linear.linear(x, state, None, shape, blocksize, path=path), x, w.t())
    assert_product(nf4_linear.linear_backward(dy, state, shape, blocksize, path=path), dy, w)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((3, 4096), 4096), ((3, 1000), 64), ((550, 3), 64), ((550, 66), 32)]
)
def test_split_sums_are_right_and_repeatable(shape, blocksize, dtype):
    """Long sums over few tiles are split, and the parts are added in a fixed order."""
    (n, k), state = shape, random_state(shape, blocksize, True)
    w = definition(state, shape, blocksize)
    x, dy, bias = random(2, k, dtype=dtype), random(2, n, dtype=dtype), random(n, dtype=dtype)
    y = nf4_linear.linear(x, state, bias, shape, blocksize, path="gemv")
    dx = nf4_linear.linear_backward(dy, state, shape, blocksize, path="gemv")
    assert_product(y, x, w.t(), bias)
    assert_product(dx, dy, w)
    if GPU:
        assert torch.equal(y, nf4_linear.linear(x, state, bias, shape, blocksize, path="gemv"))
        assert torch.equal(dx, nf4_linear.linear_backward(dy, state, shape, blocksize, path="gemv"))


@native
@pytest.mark.parametrize("path", PATHS)
def test_no_error_adds_up_for_x_of_one_sign(path):
    """The error of a rounded code table has one sign, which shows when nothing cancels."""
    shape = (256, 4096) if GPU else (32, 1024)
    state = random_state(shape, 64, False)
    w = definition(state, shape, 64)
    # fp32 rounds nothing.
    for dtype in DTYPES[1:]:
        x = torch.ones(2, shape[1], device=DEVICE, dtype=dtype)
        assert_product(nf4_linear.linear(x, state, None, shape, 64, path=path), x, w.t())


@native
def test_several_panels_are_right(monkeypatch):
    """There is more than one panel, and the last one is short, in both directions."""
    monkeypatch.setattr(nf4_linear, "PANEL_BYTES", dict.fromkeys(nf4_linear.PANEL_BYTES, 1))
    # Each has 128 rows or columns, and a rest.
    for shape in ((140, 64), (129, 33), (9, 192), (9, 151)):
        state = random_state(shape, 64, True)
        w = definition(state, shape, 64)
        x, dy, bias = random(5, shape[1]), random(5, shape[0]), random(shape[0])
        assert_product(nf4_linear.linear(x, state, bias, shape, 64, path="panel"), x, w.t(), bias)
        assert_product(nf4_linear.linear_backward(dy, state, shape, 64, path="panel"), dy, w)


@native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(40, 128), (40, 33)], ids=str)
def test_nan_stays_in_its_row(shape, path):
    state = random_state(shape, 64, False)
    x, dy = random(5, shape[1]), random(5, shape[0])
    x[2, 3] = dy[2, 3] = float("nan")
    y = nf4_linear.linear(x, state, None, shape, 64, path=path)
    dx = nf4_linear.linear_backward(dy, state, shape, 64, path=path)
    for result in (y, dx):
        assert result[2].isnan().all() and result[[0, 1, 3, 4]].isfinite().all()


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(64, 33), (33, 64)], ids=str)
def test_nothing_behind_the_tensors_counts(shape, path, dtype):
    """NaNs lie behind the ends of x, dy, bias and absmax.

    64 x 33 is whole blocks, so the next element has no scale.
    """

    def guarded(t):
        return torch.cat([t.flatten(), t.new_full((512,), float("nan"))])[: t.numel()].view(t.shape)

    (n, k), state = shape, random_state(shape, 64, False)
    state[1] = guarded(state[1])
    x, dy, bias = (guarded(random(*size, dtype=dtype)) for size in ((3, k), (3, n), (n,)))
    w = definition(state, shape, 64)
    assert_product(nf4_linear.linear(x, state, bias, shape, 64, path=path), x, w.t(), bias)
    assert_product(nf4_linear.linear_backward(dy, state, shape, 64, path=path), dy, w)


@native
def test_x_may_be_aligned_to_two_bytes():
    """A view that starts at an odd element is aligned to two bytes."""
    shape = (40, 64)
    state = random_state(shape, 64, False)
    w = definition(state, shape, 64)
    x = random(3 * 64 + 1, dtype=torch.float16)[1:].view(3, 64)
    assert_product(nf4_linear.linear(x, state, None, shape, 64, path="gemv"), x, w.t())


@pytest.mark.needs("gpu")
def test_offsets_beyond_two_to_the_31_are_right():
    shape = (2**19 + 3, 4096)
    state = random_state(shape, 64, False)
    rows = slice(shape[0] - 7, shape[0])
    tail = [state[0].flatten()[-7 * 2048 :], state[1][-7 * 64 :], state[2]]
    w = definition(tail, (7, 4096), 64)
    out = torch.empty(7, 4096, device=DEVICE)
    nf4.dequantize_segments(state, 64, out, rows.start * 4096, 1, out.numel(), 0)
    assert torch.equal(out.cpu(), w)
    x = random(2, 4096, dtype=torch.float16)
    for path in ("gemv", "fused"):
        assert_product(nf4_linear.linear(x, state, None, shape, 64, path=path)[:, rows], x, w.t())


@native
def test_the_path_follows_the_number_of_rows():
    for op in ("linear", "linear_backward"):
        for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
            paths = [
                nf4_linear.choose(op, m, 4096, 4096, torch.float16, capability)[0]
                for m in (1, 16, 17, 32, 8192)
            ]
            assert paths == ["gemv", "gemv", "fused", "fused", "panel"]
            assert nf4_linear.choose(op, 100, 4096, 4096, torch.float32, capability)[0] == "panel"
    for capability, source in (((8, 9), "not measured"), ((9, 0), "on an H200")):
        assert source in nf4_linear.choose("linear", 1, 4096, 4096, torch.float16, capability)[1]


@native
def test_the_decoding_assembly_looks_up_the_table():
    """The interpreter cannot run DECODE, so its instructions are run here, one by one."""

    def prmt(a, b, selector):
        source = (b << 32 | a).to_bytes(8, "little")
        nibbles = [selector >> 4 * i & 15 for i in range(4)]
        # 8 and above would replicate a sign.
        assert all(n < 8 for n in nibbles)
        return int.from_bytes(bytes(source[n] for n in nibbles), "little")

    def lop3(a, b, c, table):
        assert table == 0xEA
        return a & b | c

    run = {"and": lambda a, b: a & b, "shr": lambda a, b: a >> b, "lop3": lop3, "prmt": prmt}
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        codes = torch.randint(2**16, (16,), generator=g).tolist()
        word = torch.randint(2**32, (1,), generator=g).item()
        names = {"$4": word}
        for i in range(4):
            names[f"${5 + i}"] = sum((codes[4 * i + j] & 255) << 8 * j for j in range(4))
            names[f"${9 + i}"] = sum((codes[4 * i + j] >> 8) << 8 * j for j in range(4))
        lines = [line.strip(" ;") for line in DECODE.value.splitlines()]
        for line in lines:
            if line and line[0] not in "{}.":
                op, out, *arguments = line.replace(",", "").split()
                values = [names[a] if a in names else int(a, 0) for a in arguments]
                names[out] = run[op.split(".")[0]](*values)
        weights = [codes[byte >> 4] | codes[byte & 15] << 16 for byte in word.to_bytes(4, "little")]
        assert [names[f"${j}"] for j in range(4)] == weights


@triton.jit
def _gain_kernel(code_ptr, gain_ptr, T: tl.constexpr):
    tl.store(gain_ptr + tl.zeros([1, 1], tl.int32), code_gain(code_ptr, T))


def gain_of(code, dtype):
    gain = torch.empty(1, device=DEVICE)
    _gain_kernel[(1,)](
        code.to(DEVICE), gain, T={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    )
    return gain.item()


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_errors_of_rounded_codes_are_those_documented(dtype):
    """code_gain's docstring has the numbers; each code counts as often as normal weights use it."""
    gain = gain_of(CODE, dtype)
    w = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    absmax = w.abs().amax(1, keepdim=True)
    nibble = ((w / absmax)[..., None] > THRESHOLDS).sum(-1)
    exact = (CODE[nibble] * absmax).double()
    error = ((CODE * gain).to(dtype).double()[nibble] / gain * absmax) - exact
    rounded = exact.to(torch.float32).to(dtype).double() - exact
    rms, size = error.pow(2).mean().sqrt(), exact.pow(2).mean().sqrt()
    assert rms < 0.8 * rounded.pow(2).mean().sqrt()
    assert rms / size == pytest.approx(
        {torch.bfloat16: 1.3e-3, torch.float16: 1.4e-4}[dtype], rel=0.05
    )
    assert error.mean().abs() < 2e-5 * size
    projection = ((error * exact).sum() / exact.pow(2).sum()).item()
    assert projection == pytest.approx(
        {torch.bfloat16: -7.2e-4, torch.float16: 8.0e-5}[dtype], rel=0.05
    )


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_codes_of_fp4_are_exact(dtype):
    """A factor makes them exact."""
    code = nf4_codebooks.CODE["fp4"]
    scaled = code.double() * gain_of(code, dtype)
    assert torch.allclose(scaled.to(dtype).double(), scaled, rtol=1e-7, atol=0)


# ---------------------------------------------------------------- what is registered for CUDA


@native
@pytest.mark.parametrize("nested", [False, True])
def test_registered_quantize_is_the_reference(nested):
    for shape in [(7, 33), (130,), (2, 5, 64), (0, 64)]:
        weight = random(*shape)
        tables = [
            CODE,
            nf4_codebooks.THRESHOLDS["nf4"],
            nf4_codebooks.ORDER["nf4"],
            nf4_codebooks.NESTED_THRESHOLDS,
        ]
        code, *tables = (table.to(DEVICE) for table in tables)
        packed, absmax, nested_absmax, offset = registry.run_kernel(
            "nf4_quantize", weight, *tables, 64, nested
        )
        exact = reference.nf4_quantize_op(weight, *tables, 64, nested)
        assert all(map(torch.equal, (packed, absmax, nested_absmax, offset), exact))
        extra = [nested_absmax, nf4_codebooks.NESTED_CODE.to(DEVICE), offset] if nested else []
        values = registry.run_kernel(
            "nf4_dequantize", [packed, absmax, code, *extra], shape, 64, torch.float32
        )
        assert torch.equal(values, reference.nf4_values([packed, absmax, code, *extra], shape, 64))
    with pytest.raises(ValueError, match="weight holds NaN"):
        registry.run_kernel("nf4_quantize", random(3, 5) * math.nan, *tables, 64, nested)


@native
@pytest.mark.parametrize("shape", [(12, 66), (0, 64), (12, 0)], ids=str)
@pytest.mark.parametrize("rows", [(), (0,), (2, 3)], ids=str)
def test_registered_products_are_the_reference(shape, rows):
    state = random_state(shape, 64, True)
    bias = random(2 * shape[0])[::2]
    for dtype in (torch.float32, torch.float64):
        x, dy = random(*rows, shape[1], dtype=dtype), random(*rows, shape[0], dtype=dtype)
        for b in (None, bias.to(dtype)[:]):
            y = registry.run_kernel("nf4_linear", x, state, b, shape, 64)
            torch.testing.assert_close(y, reference.nf4_linear_op(x, state, b, shape, 64))
        dx = registry.run_kernel("nf4_linear_backward", dy, state, shape, 64)
        torch.testing.assert_close(dx, reference.nf4_linear_backward_op(dy, state, shape, 64))


@native
def test_registered_ops_refuse_what_does_not_fit():
    state = random_state((12, 66), 64, True)
    x = random(3, 66)
    for broken in (
        state[:4],
        [state[0][:-1], *state[1:]],
        [*state[:1], torch.stack([state[1]] * 2, 1)[:, 0], *state[2:]],
    ):
        with pytest.raises(ValueError, match="state holds"):
            registry.run_kernel("nf4_linear", x, broken, None, (12, 66), 64)
    with pytest.raises(ValueError, match="last dimension of 66"):
        registry.run_kernel("nf4_linear", x[:, :65], state, None, (12, 66), 64)
