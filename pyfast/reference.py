"""Every op once more in plain torch: the specification, the judge of the tests, the fallback on other devices.

Read it to know what an op computes. It runs in any dtype, float64 included, and saves neither time nor memory.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfast import codebooks, lsh_choices
from pyfast.nf4_weight import NF4Weight

# --- NF4 ---


def nf4_quantize(weight: Tensor, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4") -> NF4Weight:
    """Blocks of the flattened weight, each scaled by its largest magnitude and rounded to the nearest code."""
    tables = (codebooks.THRESHOLDS[quant_type], codebooks.ORDER[quant_type], codebooks.NESTED_THRESHOLDS)
    packed, absmax, nested_absmax, offset = nf4_quantize_op(
        weight, *(table.to(weight.device) for table in tables), blocksize, nested
    )
    extra = {}
    if nested:
        nested_code = codebooks.NESTED_CODE.to(weight.device)
        extra = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    code = codebooks.CODE[quant_type].to(weight.device)
    return NF4Weight(packed, absmax, code, weight.shape, blocksize, weight.dtype, quant_type, **extra)


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight again: code * scale in float32, rounded once to `dtype`."""
    return nf4_dequantize_op(w.state, w.shape, w.blocksize, dtype or w.dtype)


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias."""
    return nf4_linear_op(x, w.state, bias, w.shape, w.blocksize)


def nf4_quantize_op(
    weight: Tensor, thresholds: Tensor, order: Tensor, nested_thresholds: Tensor, blocksize: int, nested: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed nibbles, scales; nested, the scales' 8-bit codes with their own scales and mean."""
    flat = weight.detach().reshape(-1).float()
    short = flat.numel() % blocksize
    blocks = F.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if len(blocks) else flat.new_empty(0)
    divisor = absmax.clamp(min=codebooks.SMALLEST_ABSMAX)[:, None]
    scaled = blocks * (1 / divisor)
    if short:  # bitsandbytes divides here, and stores the clamped scale
        scaled[-1] = blocks[-1] / divisor[-1]
        absmax[-1] = divisor[-1]
    nibbles = order[torch.bucketize(scaled.view(-1)[: flat.numel()], thresholds)]
    if flat.numel() % 2:
        nibbles = torch.cat([nibbles, order[torch.bucketize(flat.new_zeros(1), thresholds)]])
    packed = (nibbles[::2] << 4 | nibbles[1::2])[:, None]
    if not nested:
        check_finite(absmax)
        return packed, absmax, flat.new_empty(0), flat.new_empty(0)
    offset = mean_absmax(absmax)
    check_finite(offset)
    codes, nested_absmax = _quantize_scales(absmax - offset, nested_thresholds)
    return packed, codes, nested_absmax, offset


def mean_absmax(absmax: Tensor) -> Tensor:
    """[1]; of no scales, 0."""
    return absmax.mean().view(1) if absmax.numel() else absmax.new_zeros(1)


def check_finite(scales: Tensor) -> None:
    """A NaN or an infinity in the weight reaches its block's scale, and the mean of all scales."""
    if not bool(scales.isfinite().all()):
        raise ValueError("weight holds NaN, infinite or overflowing values; it must be finite to be quantised")


def _quantize_scales(centred: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    size = codebooks.NESTED_BLOCKSIZE
    groups = F.pad(centred, (0, -len(centred) % size)).view(-1, size)
    nested_absmax = groups.abs().amax(dim=1) if len(groups) else centred.new_empty(0)
    codes = torch.bucketize(groups * (1 / nested_absmax)[:, None], thresholds)
    codes = torch.where(nested_absmax[:, None] == 0, 0, codes)
    return codes.view(-1)[: len(centred)].to(torch.uint8), nested_absmax


def nf4_values(state: list[Tensor], shape: tuple[int, ...], blocksize: int) -> Tensor:
    """The float32 value of every nibble."""
    packed, absmax, code, *nested = state
    scale = absmax
    if nested:
        nested_absmax, nested_code, offset = nested
        group = torch.arange(len(absmax), device=absmax.device) // codebooks.NESTED_BLOCKSIZE
        scale = nested_code[absmax.long()] * nested_absmax[group] + offset
    numel = math.prod(shape)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[:numel].long()
    block = torch.arange(numel, device=packed.device) // blocksize
    return (code[nibbles] * scale[block]).view(shape)


def nf4_dequantize_op(state: list[Tensor], shape: tuple[int, ...], blocksize: int, dtype: torch.dtype) -> Tensor:
    return nf4_values(state, shape, blocksize).to(dtype)


def nf4_linear_op(
    x: Tensor, state: list[Tensor], bias: Tensor | None, shape: tuple[int, ...], blocksize: int
) -> Tensor:
    return F.linear(x, nf4_values(state, shape, blocksize).to(x.dtype), bias)


def nf4_linear_backward_op(dy: Tensor, state: list[Tensor], shape: tuple[int, ...], blocksize: int) -> Tensor:
    """dx = dy W."""
    return dy @ nf4_values(state, shape, blocksize).to(dy.dtype)


# --- dropout ---


def philox(seed: int, row: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32 of 7 rounds: key = seed, counter = (counter, row's low word, row's high word, 0). [.., 4] words."""
    word = 0xFFFFFFFF
    c = [counter & word, row & word, row >> 32 & word, torch.zeros_like(row & counter)]
    c[0], c[1], c[2] = (v + c[3] for v in c[:3])
    k = [seed & word, seed >> 32 & word]
    for _ in range(7):
        high0, low0 = _multiply_words(0xD2511F53, c[0])
        high1, low1 = _multiply_words(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    return torch.stack(c, dim=-1)


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low words of a product of two 32-bit numbers, which int64 cannot hold."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def dropout_threshold(p: float) -> int:
    """P in units of 2^-16, which is how exactly it is kept."""
    return min(round(p * 65536), 65535)


def dropout_mask(rows: int, cols: int, p: float, seed: int, device=None) -> Tensor:
    """[rows, cols] of 0 and 1 / (1 - p). Element (i, j) is kept if its 16 random bits are not below the threshold.

    They are half j % 2 (low first) of word j / 2 % 4 of philox(seed, row i, counter j / 8).
    """
    row = torch.arange(rows, device=device)[:, None]
    counter = torch.arange(-(-cols // 8), device=device)[None, :]
    words = philox(seed, row, counter).flatten(1)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :cols]
    threshold = dropout_threshold(p)
    return (bits >= threshold).double() / (1 - threshold / 65536)


# --- LoRA ---


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Y = g (x W^T + scaling (drop(x) A^T B^T + lora_bias)) + bias.

    g = 1, or with a magnitude (DoRA) magnitude / ||W + scaling B A||, a norm a row, a constant to autograd.
    """
    w = _dense(weight, x.dtype)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    y = F.linear(x, w) + scaling * F.linear(F.linear(_dropped(x, dropout_p, seed), a), b)
    if lora_bias is not None:
        y = y + scaling * lora_bias.to(x.dtype)
    if magnitude is not None:
        norm = (w + scaling * b @ a).detach().norm(dim=1)
        y = y * (magnitude.to(x.dtype) / norm)
    return y if bias is None else y + bias.to(x.dtype)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    adapter_ids: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Row i of y = W x_i + scaling[id] B[id] A[id] x_i + bias, id = adapter_ids[i]; -1: no adapter."""
    y = F.linear(x, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    scaling = torch.as_tensor(scaling, dtype=x.dtype, device=x.device).expand(len(lora_a))
    for i, (a, b) in enumerate(zip(lora_a.to(x.dtype), lora_b.to(x.dtype))):
        mine = (adapter_ids == i)[..., None]
        y = y + mine * scaling[i] * F.linear(F.linear(x, a), b)
    return y


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, NF4Weight):
        return nf4_values(weight.state, weight.shape, weight.blocksize).to(dtype)
    return weight.to(dtype)


def _dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    if dropout_threshold(p) == 0:
        return x
    mask = dropout_mask(x.shape[:-1].numel(), x.shape[-1], p, seed, x.device)
    return x * mask.view(x.shape).to(x.dtype)


# The registered ops. `route` sorts rows by adapter: [] for one adapter, or [order, starts, scales], where segment i,
# the rows order[starts[i] : starts[i + 1]], has adapter i and scale scales[i]; the rows before starts[0] have none.


def lora_shrink_op(x, lora_a, scaling, dropout_p, seeds, route):
    """S = [scaling_i drop_i(x) A_i^T for every projection i that shares x]; lora_a: [n, r_i, in] each."""
    wide = _sum_dtype(x)
    parts = []
    for i, a in enumerate(lora_a):
        dropped = _dropped(x.to(wide), dropout_p, None if seeds is None else int(seeds[i]))
        parts.append(_routed(dropped, a.to(wide).mT, route) * scaling[i])
    return torch.cat(parts, dim=-1)


def lora_linear_op(x, s, base, lora_b, bias, gain, shape, blocksize, route):
    """Y = gain (x W^T + S B^T) + bias; lora_b: [n, out, r]."""
    wide = _sum_dtype(x)
    w = _base_values(base, shape, blocksize, wide)
    y = F.linear(x.to(wide), w) + _routed(s.to(wide), lora_b.to(wide).mT, route, scaled=False)
    y = y if gain is None else y * gain.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def lora_expand_backward_op(dy, s, lora_b, gain, z, scaling, route, needs):
    """U = scaling (gain dy) B, dB = (gain dy)^T S, sum(dy), sum(dy z), as `needs` says: one pass over dy."""
    wide = _sum_dtype(dy)
    dy = dy.to(wide)
    scaled = dy if gain is None else dy * gain.to(wide)
    u = _routed(scaled, lora_b.to(wide), route) * scaling if needs[0] else dy.new_empty(0)
    db = _routed_outer(scaled, s.to(wide), route, len(lora_b)) if needs[1] else dy.new_empty(0)
    sums = [dy, dy if z is None else dy * z.to(wide)]
    sums = [
        t.reshape(dy.shape[:-1].numel(), dy.shape[-1]).sum(0) if need else dy.new_empty(0)
        for t, need in zip(sums, needs[2:])
    ]
    return u, db.to(lora_b.dtype), *sums


def lora_linear_backward_op(dy, u, base, lora_a, gain, add, shape, blocksize, dropout_p, seed, route):
    """Dx = (gain dy) W + mask (U A) + add."""
    wide = _sum_dtype(dy)
    scaled = dy.to(wide) if gain is None else dy.to(wide) * gain.to(wide)
    low = _routed(u.to(wide), lora_a.to(wide), route, scaled=False)
    dx = scaled @ _base_values(base, shape, blocksize, wide) + _dropped(low, dropout_p, seed and int(seed))
    return (dx if add is None else dx + add.to(wide)).to(dy.dtype)


def lora_shrink_backward_op(u, x, ranks, n, dropout_p, seeds, route, dtype):
    """DA_i = U_i^T drop_i(x), [n, r_i, in] each, of U = [U_i]."""
    wide, found = _sum_dtype(x), []
    for i, part in enumerate(u.to(wide).split(ranks, dim=-1)):
        dropped = _dropped(x.to(wide), dropout_p, None if seeds is None else int(seeds[i]))
        found.append(_routed_outer(part, dropped, route, n).to(dtype))
    return found


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _base_values(base, shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    """A dense base is one tensor, with blocksize 0; any other is the state of an NF4Weight."""
    return (base[0] if blocksize == 0 else nf4_values(base, shape, blocksize)).to(dtype)


def _segments(route):
    order, starts, scales = route
    for i, (begin, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:])):
        yield i, order[begin:end].long(), scales[i]


def _routed(x: Tensor, matrices: Tensor, route, scaled: bool = True) -> Tensor:
    """Each row times its adapter's matrix (and scale); rows without one give zero."""
    if not route:
        return x @ matrices[0]
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_zeros(len(rows), matrices.shape[-1])
    for i, mine, scale in _segments(route):
        out[mine] = rows[mine] @ matrices[i] * (scale if scaled else 1)
    return out.view(*x.shape[:-1], -1)


def _routed_outer(a: Tensor, b: Tensor, route, n: int) -> Tensor:
    """a^T b over the rows of each adapter. [n, a's width, b's width]"""
    a, b = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (a, b))
    if not route:
        return (a.t() @ b)[None]
    out = a.new_zeros(n, a.shape[1], b.shape[1])
    for i, mine, _ in _segments(route):
        out[i] = a[mine].t() @ b[mine]
    return out


def lora_row_squares_op(base, shape, blocksize):
    """||W||^2 of each row."""
    wide = torch.float32 if blocksize else _sum_dtype(base[0])
    return _base_values(base, shape, blocksize, wide).square().sum(1)


# --- bottleneck adapters ---

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
_SLOPES = {  # (dh, z) -> dh act'(z)
    "relu": lambda dh, z: torch.ops.aten.threshold_backward(dh, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dh, z: torch.ops.aten.gelu_backward(dh, z, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
    "tanh": lambda dh, z: torch.ops.aten.tanh_backward(dh, torch.tanh(z)),
}


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scaling: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scaling * (act(x Wd^T + bd) Wu^T + bu); the residual is x by default."""
    hidden = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    return (x if residual is None else residual) + scaling * F.linear(hidden, up_weight, up_bias)


def adapter_op(x, down_weight, down_bias, up_weight, up_bias, residual, activation: str, scaling: float) -> Tensor:
    """The same with sums in float32 at least, rounded once to the residual's dtype."""
    residual = x if residual is None else residual
    wide = _wide(x, down_weight, down_bias, up_weight, up_bias, residual)
    return adapter(*wide[:5], activation=activation, scaling=scaling, residual=wide[5]).to(residual.dtype)


def adapter_backward_op(
    dy, x, down_weight, down_bias, up_weight, residual_is_x: bool, activation: str, scaling: float, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters, those of the biases in float32 at least; not needed: empty."""
    rows, up_w, down_w, down_b = x.reshape(-1, x.shape[-1]), up_weight, down_weight, down_bias
    dy_rows = dy.reshape(len(rows), dy.shape[-1])
    rows, down_w, down_b, up_w, dy_rows = _wide(rows, down_w, down_b, up_w, dy_rows)
    z = F.linear(rows, down_w, down_b)
    dz = _SLOPES[activation](scaling * dy_rows @ up_w, z)
    dx = dz @ down_w + dy_rows if residual_is_x else dz @ down_w
    d_up = scaling * dy_rows.t() @ ACTIVATIONS[activation](z)
    found = [
        dx.view(x.shape).to(x.dtype),
        (dz.t() @ rows).to(down_weight.dtype),
        dz.sum(0),
        d_up.to(up_weight.dtype),
        scaling * dy_rows.sum(0),
    ]
    return tuple(grad if need else grad.new_empty(0) for grad, need in zip(found, needs))


def _wide(first: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    dtype = torch.promote_types(first.dtype, torch.float32)
    return [None if tensor is None else tensor.to(dtype) for tensor in (first, *others)]


# --- LSH attention ---


def lsh_buckets(qk, *, n_hashes=None, n_buckets, seed=None, rotations=None, key_padding_mask=None) -> Tensor:
    """[batch, heads, n_hashes, length]: in each round which of the rotations and their opposites is nearest."""
    rounds, factors = lsh_choices.rounds_and_factors(n_hashes, n_buckets, rotations)
    if rotations is None:
        shape = (qk.shape[1], qk.shape[-1], rounds, sum(factors) // 2)
        rotations = lsh_rotations_op(torch.as_tensor(seed), shape).to(qk.device)
    buckets = lsh_hash_op(qk, lsh_choices.five_dims(rotations), factors)
    if key_padding_mask is None:
        return buckets
    return torch.where(key_padding_mask[:, None, None], buckets, math.prod(factors))


def lsh_rotations_op(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers: four from the words of philox(seed, row 2^62, counter i / 4), by Box and Muller."""
    count = math.prod(shape)
    group = torch.arange(-(-count // 4), device=seed.device)
    words = philox(int(seed), 2**62 + (group >> 32), group).view(-1, 2, 2).double()
    radius = (-2 * (((words[..., 0] / 256).floor() + 0.5) / 2**24).log()).sqrt()
    angle = 2 * math.pi * words[..., 1] / 2**32
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.flatten()[:count].view(shape).float()


def lsh_hash_op(x: Tensor, rotations: Tensor, factors: list[int]) -> Tensor:
    """Bucket ids [b, h, rounds, n] of x[b, h, n, d]; rotations [b, h, d, rounds, sum(factors) / 2]."""
    dtype = _sum_dtype(x)
    rotated = torch.einsum("bhnd,bhdrw->bhrnw", x.to(dtype), rotations.to(dtype).expand(*x.shape[:2], -1, -1, -1))
    buckets, product = 0, 1
    for factor, part in zip(factors, rotated.split([f // 2 for f in factors], dim=-1)):
        buckets = buckets + product * torch.cat([part, -part], dim=-1).argmax(dim=-1)
        product *= factor
    return buckets.int()


def lsh_sort_op(buckets: Tensor, n_buckets: int) -> tuple[Tensor, Tensor]:
    """The positions by (bucket, position), and each position's rank among them."""
    if buckets.numel() and not (int(buckets.min()) >= 0 and int(buckets.max()) < n_buckets):
        raise ValueError(
            f"buckets holds {int(buckets.min())} .. {int(buckets.max())}; ids must be 0 .. {n_buckets - 1}"
        )
    order = buckets.argsort(dim=-1, stable=True)
    return order.int(), _inverse(order).int()


def _inverse(order: Tensor) -> Tensor:
    ranks = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter(-1, order, ranks)


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    k: Tensor | None = None,
    n_hashes: int | None = None,
    chunk_length: int = 64,
    n_buckets: int | tuple[int, ...] | None = None,
    causal: bool = True,
    preset: str = "trax",
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    rotations: Tensor | None = None,
    buckets: Tensor | None = None,
    return_lse: bool = False,
    return_buckets: bool = False,
    **choices,
) -> Tensor | tuple[Tensor, ...]:
    """Hash, sort, and softmax over what each query sees: see `lsh_attention_op`."""
    c = lsh_choices.resolve(preset, k is not None, **choices)
    factors = lsh_choices.factors(n_buckets, c.bucket_rule, qk.shape[2], chunk_length, rotations)
    if buckets is None:
        padded = key_padding_mask if c.pad_bucket else None
        if rotations is None:
            shape = (qk.shape[1], qk.shape[-1], n_hashes or 4, sum(factors) // 2)
            rotations = lsh_rotations_op(torch.as_tensor(seed), shape).to(qk.device)
        sides = [qk] if k is None else [qk, k.repeat_interleave(qk.shape[1] // k.shape[1], dim=1)]
        hashing = dict(n_buckets=factors, rotations=rotations, key_padding_mask=padded)
        buckets = torch.stack([lsh_buckets(side, **hashing) for side in sides])
    buckets = buckets if buckets.dim() == 5 else buckets[None]
    order, ranks = lsh_sort_op(buckets, math.prod(factors) + 1)
    given = (buckets if c.same_bucket else None, ranks if c.correct_duplicates else None, key_padding_mask)
    seed = None if seed is None else torch.as_tensor(seed)
    scale = qk.shape[-1] ** -0.5 if c.scale is None else c.scale
    rest = (chunk_length, scale, c.key_norm, c.wrap, causal, c.attend_self, c.mask_queries)
    out, lse = lsh_attention_op(qk, k, v, order, *given, seed, dropout_p, *rest)
    found = [out, *([lse] if return_lse else [])]
    if return_buckets:
        found.append(buckets[0] if k is None else buckets)
    return tuple(found) if len(found) > 1 else out


def lsh_attention_op(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    buckets: Tensor | None,
    ranks: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    chunk_length: int,
    scale: float,
    key_norm: str,
    wrap: str,
    causal: bool,
    attend_self: bool,
    mask_queries: bool,
) -> tuple[Tensor, Tensor]:
    """One softmax over all that a query sees in all rounds; what it sees twice counts twice. With its lse, [b, h, n].

    q[b, h, n, d]; k, with heads that divide q's, is q if not given; v[b, heads that divide q's, n, e]. order[s, b, h,
    rounds, n], as lsh_sort gives it: of the queries, and of the keys if they have their own (s = 2). In each round the
    sorted tokens are cut into chunks; a query sees the keys of its chunk and of the one before: those of its own bucket
    if `buckets` is given, not later ones if `causal`, none that `mask` has False. If `ranks` is given, what it sees n
    times counts once. A query that sees no key but its own has its own value as its result, and an lse of -inf.
    """
    wide = _sum_dtype(q)
    n = q.shape[2]
    keys, values = (_all_heads(t.to(wide), q.shape[1]) for t in (_normalised(q if k is None else k, key_norm), v))
    position = torch.arange(n, device=q.device)
    allowed = torch.ones(n, n, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (position[:, None] >= position)
    if not attend_self:
        allowed = allowed & (position[:, None] != position)
    allowed = allowed.expand(*q.shape[:2], n, n)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
        if mask_queries:
            allowed = allowed & mask[:, None, :, None]
    times, kept = _times_seen(order, buckets, chunk_length, wrap, dropout_p, seed)  # kept: after dropout
    times, kept = times.to(wide) * allowed, kept.to(wide) * allowed
    if ranks is not None:
        kept, times = kept / times.clamp(min=1), times.clamp(max=1)
    queries, seen_values = q.to(wide), values
    if mask is not None:  # nothing of a masked token is used, not even times 0
        hidden = ~mask[:, None, :, None]
        keys, seen_values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
        queries = queries.masked_fill(hidden, 0) if mask_queries else queries
    scores = scale * queries @ keys.mT
    sees = times.sum(-1, keepdim=True) > 0
    lse = torch.where(times > 0, scores + times.clamp(min=1).log(), -math.inf).logsumexp(-1, keepdim=True)
    weights = torch.where(times > 0, scores - torch.where(sees, lse, 0), -math.inf).exp() * kept
    out = torch.where(sees, weights @ seen_values, values)
    return out.to(q.dtype), lse[..., 0]


def lsh_attention_backward_op(dout, dlse, q, k, v, out, lse, order, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """The definition's own gradients, of q, k (empty where it is q) and v; the last of `rest` says which are needed."""
    *rest, needs = rest
    wide = _sum_dtype(q)
    given = [None if t is None else t.detach().to(wide).requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out, lse = lsh_attention_op(*given, order, *rest)
    slopes = [dout.to(wide), torch.zeros_like(lse) if dlse is None else torch.where(lse.isinf(), 0, dlse.to(wide))]
    wanted = [t for t, need in zip(given, needs) if need and t is not None]
    grads = iter(torch.autograd.grad([out, lse], wanted, slopes) if wanted else ())
    return tuple(
        next(grads).to(t.dtype) if need and t is not None else q.new_empty(0) for t, need in zip((q, k, v), needs)
    )


def _normalised(x: Tensor, key_norm: str) -> Tensor:
    x = x.to(_sum_dtype(x))
    if key_norm == "rms":
        return x * (x.square().sum(-1, keepdim=True) + 1e-6 * x.shape[-1]).rsqrt()
    return F.normalize(x, dim=-1) if key_norm == "l2" else x


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _times_seen(order, buckets, chunk_length: int, wrap: str, dropout_p: float, seed) -> tuple[Tensor, Tensor]:
    """How often each query sees each key, [.., n queries, n keys]; and that after dropout.

    Dropout's element is row = the query's rank, counted through all batches, heads and rounds, and column = the key's
    place in the two chunks, the earlier one first.
    """
    ranks = _inverse(order.long())
    rank_q, rank_k = ranks[0][..., None], ranks[-1][..., None, :]  # [batch, heads, rounds, n, 1] and [.., 1, n]
    rounds, n = order.shape[-2:]
    last = (n - 1) // chunk_length
    times = kept = 0
    for t in range(rounds):
        chunk = rank_q[:, :, t] // chunk_length
        views = [(t, chunk == rank_k[:, :, t] // chunk_length, chunk_length)]  # round, whether seen, first column
        views.append((t, chunk - 1 == rank_k[:, :, t] // chunk_length, 0))
        before = (t - 1) % rounds if wrap == "rounds" else t
        if wrap != "none" and not (before == t and last == 0):
            views.append((before, (chunk == 0) & (rank_k[:, :, before] // chunk_length == last), 0))
        for s, seen, column in views:
            if buckets is not None:
                same = buckets[0][:, :, t, :, None] == buckets[-1][:, :, s, None]
                seen = seen & same if s == t else torch.zeros_like(seen)
            times = times + seen.int()
            keeps = 1
            if dropout_threshold(dropout_p):
                place = column + rank_k[:, :, s] % chunk_length
                keeps = _lsh_dropout(rank_q[:, :, t], place, t, rounds, chunk_length, dropout_p, seed)
            kept = kept + seen * keeps
    return times, kept


def _lsh_dropout(rank_q, column, t: int, rounds: int, chunk_length: int, p: float, seed) -> Tensor:
    """[batch, heads, n, n] of 0 and 1 / (1 - p)."""
    batch, heads, n, _ = rank_q.shape
    mask = dropout_mask(batch * heads * rounds * n, 2 * chunk_length, p, int(seed), rank_q.device)
    head = torch.arange(batch * heads, device=rank_q.device).view(batch, heads, 1, 1)
    return mask[(head * rounds + t) * n + rank_q, column]


# --- reversible blocks ---


def reversible(
    blocks,
    x1: Tensor,
    x2: Tensor,
    *args,
    exact: bool | str = False,
    fraction_bits: int = 16,
    return_hidden: bool = False,
    f_kwargs: dict | None = None,
    g_kwargs: dict | None = None,
    **kwargs,
) -> tuple[Tensor, ...]:
    """y1 = x1 + F(x2), y2 = x2 + G(y1). exact, True or "int32": all summands rounded to multiples of 2^-fraction_bits,
    in sums that are exact: float32 ones below 2^(24 - fraction_bits), float64 ones for "int32". No range is checked.
    """
    wide = {False: x1.dtype, True: torch.float32, "int32": torch.float64}[exact]
    s1, s2 = (_on_grid(x.to(wide), fraction_bits, exact) for x in (x1, x2))
    hidden = []
    for f, g in blocks:
        s1 = s1 + _on_grid(f(s2.to(x1.dtype), *args, **kwargs, **(f_kwargs or {})).to(wide), fraction_bits, exact)
        s2 = s2 + _on_grid(g(s1.to(x1.dtype), *args, **kwargs, **(g_kwargs or {})).to(wide), fraction_bits, exact)
        hidden.append((s1.to(x1.dtype), s2.to(x1.dtype)))
    return (*hidden[-1], hidden) if return_hidden else hidden[-1]


def _on_grid(x: Tensor, bits: int, exact: bool | str) -> Tensor:
    """Rounded, and a straight line to the gradient."""
    return x + (torch.round(x * 2.0**bits) * 2.0**-bits - x).detach() if exact else x


def reversible_step_op(stream, out, subtract, bits, flag) -> None:
    """stream +- out in place, rounded to multiples of 2^-bits unless bits is -1. To `flag`: 1, a sum left the range of
    float32's 24 bits, or int32's; 2, out was not finite.
    """
    sign = -1 if subtract else 1
    if bits < 0:
        stream.add_(out, alpha=sign)
    elif stream.dtype == torch.int32:
        most = 2.0**31 - 128  # the largest float below
        units = sign * torch.round(out.float() * 2.0**bits)
        r = units.nan_to_num().clamp(-most, most).to(torch.int32)
        y = stream + r
        left = (((stream ^ y) & (r ^ y)) < 0) | ~(units.abs() <= most)
        stream.copy_(y)
    else:
        stream.add_(torch.round(out.float() * 2.0**bits) * 2.0**-bits, alpha=sign)
        left = ~(stream.abs() < 2.0 ** (24 - bits))
    if bits >= 0:
        trouble = torch.where(out.isfinite().all(), 1, 2) * left.any()
        flag.copy_(torch.maximum(flag, trouble.to(flag.dtype)))


# --- chunks ---


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the logits, in float32 at least: of the mean over no tokens, 0."""
    logits = F.linear(hidden, weight, bias).to(_sum_dtype(hidden)).reshape(-1, len(weight))
    total = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else total


def chunked_feed_forward(ff: Callable[[Tensor], Tensor], x: Tensor, chunk: int, dim: int = -2) -> Tensor:
    """ff(x)"""
    return ff(x)
