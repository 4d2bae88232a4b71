r"""NF4: linear layers whose frozen weight takes 4 bits a value.

    W[i] = code[nibble[i]] * scale[i // blocksize]          one float32 product, rounded once
    y    = x W^T + bias,      dx = dy W

The forward and the backward decode W tile by tile, or, of many rows on a GPU, in panels of some 128 MB (and no fewer
than 128 columns, or a block of them): a 16-bit copy of a weight is neither kept nor, of a large one, ever made.
`pyfast/reference/_nf4.py` is the specification.
"""

import math
import os
import warnings

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pyfast import reference
from pyfast._support import checks, registry
from pyfast.formats import bitsandbytes, nf4_codebooks
from pyfast.formats.nf4_weight import STATE_NAMES, NF4Weight, empty_state

State = list[Tensor]
Shape = tuple[int, ...]

# --- the ops: CPU kernels in csrc/cpu/nf4/nf4.cpp and linear.cpp, GPU kernels in kernels/nf4.py and nf4_linear.py ---


def _check_state(state: State, numel: int, blocksize: int, *others: Tensor | None) -> None:
    """What memory safety rests on, for the paths that C++ does not check: sizes, strides, one device."""
    blocks = -(-numel // blocksize)
    sizes = [-(-numel // 2), blocks, 16, -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE), 256, 1]
    found = [tensor.numel() for tensor in state]
    if len(state) not in (3, 6) or found != sizes[: len(state)] or not all(t.is_contiguous() for t in state):
        raise ValueError(f"state holds {found} elements; it must be {sizes[:3]}, nested {sizes}, contiguous")
    devices = {tensor.device for tensor in (*state, *others) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"the arguments are on {', '.join(sorted(map(str, devices)))}; they must be on one device")


def _check_rows(x: Tensor, width: int) -> None:
    if x.dtype not in checks.FLOATS_AND_DOUBLE or x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"x or dy is {x.dtype} {list(x.shape)}; it must be floating with a last dimension of {width}")


def _quantize_fake(weight, thresholds, order, nested_thresholds, blocksize: int, nested: bool):
    numel = weight.numel()
    blocks = -(-numel // blocksize)
    groups = -(-blocks // nf4_codebooks.NESTED_BLOCKSIZE) if nested else 0
    packed = weight.new_empty((-(-numel // 2), 1), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    nested_absmax = weight.new_empty(groups, dtype=torch.float32)
    return packed, absmax, nested_absmax, weight.new_empty(int(nested), dtype=torch.float32)


def _quantize_cuda(weight, thresholds, order, nested_thresholds, blocksize: int, nested: bool):
    from pyfast.kernels import nf4 as kernels

    packed, absmax = kernels.quantize(weight.contiguous(), thresholds, order, blocksize)
    if not nested:
        reference.check_finite(absmax)
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    offset = reference.mean_absmax(absmax)
    reference.check_finite(offset)
    codes, nested_absmax = kernels.quantize_scales(absmax, offset, nested_thresholds)
    return packed, codes, nested_absmax, offset


def _dequantize_fake(state: State, shape: Shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    _check_state(state, math.prod(shape), blocksize)
    return state[0].new_empty(shape, dtype=dtype)


def _dequantize_cuda(state: State, shape: Shape, blocksize: int, dtype: torch.dtype) -> Tensor:
    from pyfast.kernels import nf4 as kernels

    _check_state(state, math.prod(shape), blocksize)
    return kernels.dequantize(state, shape, blocksize, dtype)


def _linear_fake(x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int) -> Tensor:
    _check_rows(x, shape[1])
    _check_state(state, math.prod(shape), blocksize, x, bias)
    return x.new_empty(*x.shape[:-1], shape[0])


def _linear_cuda(x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int) -> Tensor:
    from pyfast.kernels import nf4_linear as kernels

    _check_rows(x, shape[1])
    _check_state(state, math.prod(shape), blocksize, x, bias)
    size = (*x.shape[:-1], shape[0])
    if x.dtype == torch.float64:  # for gradcheck; no kernel computes in it
        return reference.nf4_linear_op(x, state, bias, shape, blocksize)
    if 0 in (*size, shape[1]):  # nothing to launch
        return x.new_zeros(size) if bias is None else x.new_empty(size).copy_(bias)
    rows = x.reshape(-1, shape[1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    return kernels.linear(rows, state, bias, shape, blocksize, path=forced_path()).view(size)


def _linear_backward_fake(dy: Tensor, state: State, shape: Shape, blocksize: int) -> Tensor:
    _check_rows(dy, shape[0])
    _check_state(state, math.prod(shape), blocksize, dy)
    return dy.new_empty(*dy.shape[:-1], shape[1])


def _linear_backward_cuda(dy: Tensor, state: State, shape: Shape, blocksize: int) -> Tensor:
    from pyfast.kernels import nf4_linear as kernels

    _check_rows(dy, shape[0])
    _check_state(state, math.prod(shape), blocksize, dy)
    size = (*dy.shape[:-1], shape[1])
    if dy.dtype == torch.float64:
        return reference.nf4_linear_backward_op(dy, state, shape, blocksize)
    if 0 in (*size, shape[0]):
        return dy.new_zeros(size)
    rows = dy.reshape(-1, shape[0]).contiguous()
    return kernels.linear_backward(rows, state, shape, blocksize, path=forced_path()).view(size)


def forced_path() -> str | None:
    """PYFAST_NF4_PATH overrides the table of kernels/nf4_linear.py: gemv, fused or panel."""
    path = os.environ.get("PYFAST_NF4_PATH")
    if path is not None:
        checks.one_of("PYFAST_NF4_PATH", path, ("gemv", "fused", "panel"))
    return path


_quantize = registry.register(
    "nf4_quantize", fake=_quantize_fake, cuda=_quantize_cuda, reference=reference.nf4_quantize_op
)
_dequantize = registry.register(
    "nf4_dequantize", fake=_dequantize_fake, cuda=_dequantize_cuda, reference=reference.nf4_dequantize_op
)
_linear = registry.register("nf4_linear", fake=_linear_fake, cuda=_linear_cuda, reference=reference.nf4_linear_op)
_linear_backward = registry.register(
    "nf4_linear_backward",
    fake=_linear_backward_fake,
    cuda=_linear_backward_cuda,
    reference=reference.nf4_linear_backward_op,
)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, shape, blocksize, *state):
        ctx.save_for_backward(*state)
        ctx.shape, ctx.blocksize = shape, blocksize
        return _linear(x, state, bias, shape, blocksize)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        state = ctx.saved_tensors  # once: activation checkpointing recomputes them
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _linear_backward(dy, state, ctx.shape, ctx.blocksize)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(dy.shape[:-1].numel(), ctx.shape[0]).sum(0)
        return dx, dbias, None, None, *(None for _ in state)


# --- the functions ---


def nf4_quantize(weight: Tensor, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4") -> NF4Weight:
    """Quantise a tensor to 4 bits a value, byte for byte as bitsandbytes does.

    Args:
        weight: float32, bfloat16 or float16, finite, of any shape.
        blocksize: values that share a scale; a power of two, 32 to 4096.
        nested: quantise the scales too, to 8 bits: 4.13 bits a value in all instead of 4.5 (at blocksize 64).
        quant_type: "nf4" for weights, which are normally distributed, or "fp4".
    """
    checks.tensor("weight", weight, checks.FLOATS)
    check_format(blocksize, nested, quant_type)
    device = weight.device
    tables = (nf4_codebooks.THRESHOLDS[quant_type], nf4_codebooks.ORDER[quant_type], nf4_codebooks.NESTED_THRESHOLDS)
    packed, absmax, nested_absmax, offset = _quantize(
        weight.detach(), *(table.to(device) for table in tables), blocksize, nested
    )
    code = nf4_codebooks.CODE[quant_type].to(device, copy=True)
    extra = {}
    if nested:
        nested_code = nf4_codebooks.NESTED_CODE.to(device, copy=True)
        extra = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    return NF4Weight(packed, absmax, code, weight.shape, blocksize, weight.dtype, quant_type, **extra)


def check_format(blocksize: int, nested: bool, quant_type: str) -> None:
    """What `nf4_quantize` takes beside the weight."""
    checks.instance("blocksize", blocksize, int)
    checks.one_of("blocksize", blocksize, nf4_codebooks.BLOCKSIZES)
    checks.instance("nested", nested, bool)
    checks.one_of("quant_type", quant_type, nf4_codebooks.QUANT_TYPES)


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight's values, in `dtype` or in the dtype it was quantised from."""
    checks.instance("w", w, NF4Weight)
    dtype = w.dtype if dtype is None else dtype
    checks.one_of("dtype", dtype, checks.FLOATS)
    return _dequantize(w.state, w.shape, w.blocksize, dtype)


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, W, bias) with W in 4 bits. Differentiable in x and bias; W is frozen.

    Args:
        x: [..., in], float32, bfloat16 or float16 (and float64 on the CPU); autocast applies.
        w: a weight of shape (out, in).
        bias: [out], of x's dtype.
    """
    checks.instance("w", w, NF4Weight)
    _check_matrix(w)
    return _checked_linear(x, w.state, bias, w.shape, w.blocksize)


def _check_matrix(w: NF4Weight) -> None:
    if len(w.shape) != 2:
        raise ValueError(f"w has shape {list(w.shape)}; a linear layer's is [out, in]")


def _checked_linear(x: Tensor, state: State, bias: Tensor | None, shape: Shape, blocksize: int) -> Tensor:
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    checks.last_dim("x", x, shape[1], "the in_features of w")
    checks.same_device("x", x, "w", state[0].device)
    dtype = registry.compute_dtype(x)
    if bias is not None:
        checks.tensor("bias", bias, checks.FLOATS_AND_DOUBLE)
        checks.shape("bias", bias, (shape[0],))
        checks.same_device("bias", bias, "x", x.device)
        if dtype == x.dtype:
            checks.same_dtype("bias", bias, "x", x)
        bias = bias.to(dtype)
    x = x.to(dtype)
    leaf = x.requires_grad or (bias is not None and bias.requires_grad)
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and leaf):  # forward mode: refused there, aloud
        return _NF4Linear.apply(x, bias, shape, blocksize, *state)
    return _linear(x, state, bias, shape, blocksize)


# --- the module ---


class NF4Linear(nn.Module):
    """nn.Linear with a frozen 4-bit weight.

    `state_dict` holds bitsandbytes' keys and loads its checkpoints, strictly, and the reverse. The scales stay
    float32 whatever `.to(dtype)` says; `bias` is an ordinary parameter.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        nested: bool = True,
        quant_type: str = "nf4",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """A layer of zeros, to load a checkpoint into; `from_linear` makes one from a layer."""
        super().__init__()
        check_format(blocksize, nested, quant_type)
        checks.size("in_features", in_features)
        checks.size("out_features", out_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        checks.one_of("dtype", dtype, checks.FLOATS)
        shape = (out_features, in_features)
        self._set(empty_state(shape, blocksize, quant_type, nested, device), shape, blocksize, dtype, quant_type)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4"
    ) -> "NF4Linear":
        """The layer with its weight quantised; the bias is the same parameter."""
        checks.instance("linear", linear, nn.Linear)
        w = nf4_quantize(linear.weight, blocksize=blocksize, nested=nested, quant_type=quant_type)
        return cls.from_weight(w, linear.bias).train(linear.training)

    @classmethod
    def from_weight(cls, w: NF4Weight, bias: Tensor | None = None) -> "NF4Linear":
        """A layer around a quantised weight, which is not copied."""
        checks.instance("w", w, NF4Weight)
        _check_matrix(w)
        if bias is not None:
            checks.tensor("bias", bias, checks.FLOATS_AND_DOUBLE)
            checks.shape("bias", bias, w.shape[:1])
            bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(w.state, w.shape, w.blocksize, w.dtype, w.quant_type)
        layer.bias = bias
        return layer

    def _set(self, state: State, shape: Shape, blocksize: int, dtype: torch.dtype, quant_type: str) -> None:
        # Frozen parameters, not buffers: DDP would broadcast buffers at every step.
        for name, tensor in zip(STATE_NAMES, [*state, *(None,) * (len(STATE_NAMES) - len(state))]):
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(_PARAMETERS[name], parameter)
        self.out_features, self.in_features = shape
        self.blocksize, self.dtype, self.quant_type = blocksize, dtype, quant_type

    def _state(self) -> State:
        plain = [self.weight, self.absmax, self.code]
        return [*plain, self.nested_absmax, self.nested_code, self.offset] if self.nested else plain

    @property
    def nested(self) -> bool:
        return self.offset is not None

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight, sharing this layer's tensors."""
        tensors = dict(zip(STATE_NAMES, (p.detach() for p in self._state())))
        shape = (self.out_features, self.in_features)
        return NF4Weight(shape=shape, blocksize=self.blocksize, dtype=self.dtype, quant_type=self.quant_type, **tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Y = x W^T + bias, in x's dtype or autocast's."""
        bias = self.bias
        if bias is not None and isinstance(x, Tensor):
            bias = bias.to(registry.compute_dtype(x))
        return _checked_linear(x, self._state(), bias, (self.out_features, self.in_features), self.blocksize)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, blocksize={self.blocksize}, nested={self.nested}"
        )

    def _apply(self, fn, recurse: bool = True):
        ours = {id(tensor) for tensor in self._state()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in ours and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination.update(bitsandbytes.bitsandbytes_entries(self.nf4_weight, prefix + "weight"))
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """All of it or nothing: every entry is read and checked before any is taken over."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weight_key, bias_key = prefix + "weight", prefix + "bias"
        entries = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        expected = bitsandbytes.bitsandbytes_keys(entries, weight_key) | (
            {bias_key} if self.bias is not None else set()
        )
        if strict:
            children = tuple(f"{prefix}{name}." for name in self._modules)
            unexpected_keys += sorted(k for k in set(entries) - expected if not k.startswith(children))
            required = {weight_key} | ({bias_key} if self.bias is not None else set())
            missing_keys += sorted(required - set(entries))
        bias = entries.get(bias_key) if self.bias is not None else None
        try:
            w = self._read(entries, weight_key) if weight_key in entries else None
            if bias is not None:
                checks.tensor(bias_key, bias, checks.FLOATS_AND_DOUBLE)
                checks.shape(bias_key, bias, (self.out_features,))
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))
            return
        self._take(w, bias, assign=local_metadata.get("assign_to_params_buffers", False))

    def _read(self, entries, key: str) -> NF4Weight:
        w, shape = bitsandbytes.read_bitsandbytes(entries, key), (self.out_features, self.in_features)
        if w.shape != shape:
            raise ValueError(f"{key} is of shape {list(w.shape)}; this layer's is {list(shape)}")
        return w

    @torch.no_grad()
    def _take(self, w: NF4Weight | None, bias: Tensor | None, assign: bool) -> None:
        if self.weight.is_meta and not assign:
            warnings.warn("a layer on the meta device loads nothing; pass assign=True to load_state_dict", stacklevel=2)
            return
        if w is not None:
            self._take_weight(w, assign)
        if bias is not None and assign:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        elif bias is not None:
            self.bias.copy_(bias)

    def _take_weight(self, w: NF4Weight, assign: bool) -> None:
        state = self._state()
        if not assign and [(t.shape, t.dtype) for t in w.state] == [(t.shape, t.dtype) for t in state]:
            for ours, theirs in zip(state, w.state):  # in place: tied and shared tensors stay so
                ours.copy_(theirs)
            self.blocksize, self.dtype, self.quant_type = w.blocksize, w.dtype, w.quant_type
        else:
            device = w.device if assign else self.weight.device
            state = [tensor.detach().to(device, copy=not assign) for tensor in w.state]
            self._set(state, w.shape, w.blocksize, w.dtype, w.quant_type)


_PARAMETERS = {name: "weight" if name == "packed" else name for name in STATE_NAMES}
