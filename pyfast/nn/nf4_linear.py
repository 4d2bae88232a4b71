"""A linear layer with a frozen 4-bit weight."""

import warnings

import torch
from torch import Tensor, nn

from pyfast._support import checks, dtypes
from pyfast.formats import bitsandbytes
from pyfast.formats.nf4_weight import STATE_NAMES, NF4Weight, empty_state
from pyfast.ops.nf4 import check_format, check_matrix, nf4_linear_from_state, nf4_quantize
from pyfast.ops.registered.nf4 import Shape, State


class NF4Linear(nn.Module):
    """nn.Linear with a frozen 4-bit weight.

    `state_dict` holds bitsandbytes' keys and loads its checkpoints, strictly, and the reverse. The
    scales stay float32 whatever `.to(dtype)` says; `bias` is an ordinary parameter.
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
        self._set(
            empty_state(shape, blocksize, quant_type, nested, device),
            shape,
            blocksize,
            dtype,
            quant_type,
        )
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4"
    ) -> "NF4Linear":
        """The layer with its weight quantized; the bias is the same parameter."""
        checks.instance("linear", linear, nn.Linear)
        w = nf4_quantize(linear.weight, blocksize=blocksize, nested=nested, quant_type=quant_type)
        return cls.from_weight(w, linear.bias).train(linear.training)

    @classmethod
    def from_weight(cls, w: NF4Weight, bias: Tensor | None = None) -> "NF4Linear":
        """A layer around a quantized weight, which is not copied."""
        checks.instance("w", w, NF4Weight)
        check_matrix(w)
        if bias is not None:
            checks.tensor("bias", bias, checks.FLOATS_AND_DOUBLE)
            checks.shape("bias", bias, w.shape[:1])
            bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(w.state, w.shape, w.blocksize, w.dtype, w.quant_type)
        layer.bias = bias
        return layer

    def _set(
        self, state: State, shape: Shape, blocksize: int, dtype: torch.dtype, quant_type: str
    ) -> None:
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
        return NF4Weight(
            shape=shape,
            blocksize=self.blocksize,
            dtype=self.dtype,
            quant_type=self.quant_type,
            **tensors,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Y = x W^T + bias, in x's dtype or autocast's."""
        bias = self.bias
        if bias is not None and isinstance(x, Tensor):
            bias = bias.to(dtypes.compute_dtype(x))
        return nf4_linear_from_state(
            x, self._state(), bias, (self.out_features, self.in_features), self.blocksize
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, blocksize={self.blocksize}, nested={self.nested}"
        )

    def _apply(self, fn, recurse: bool = True):
        ours = {id(tensor) for tensor in self._state()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return (
                tensor.to(moved.device)
                if id(tensor) in ours and moved.dtype != tensor.dtype
                else moved
            )

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
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        weight_key, bias_key = prefix + "weight", prefix + "bias"
        entries = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        expected = bitsandbytes.bitsandbytes_keys(entries, weight_key) | (
            {bias_key} if self.bias is not None else set()
        )
        if strict:
            children = tuple(f"{prefix}{name}." for name in self._modules)
            unexpected_keys += sorted(
                k for k in set(entries) - expected if not k.startswith(children)
            )
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
        w, shape = (
            bitsandbytes.read_bitsandbytes(entries, key),
            (self.out_features, self.in_features),
        )
        if w.shape != shape:
            raise ValueError(f"{key} is of shape {list(w.shape)}; this layer's is {list(shape)}")
        return w

    @torch.no_grad()
    def _take(self, w: NF4Weight | None, bias: Tensor | None, assign: bool) -> None:
        if self.weight.is_meta and not assign:
            warnings.warn(
                "a layer on the meta device loads nothing; pass assign=True to load_state_dict",
                stacklevel=2,
            )
            return
        if w is not None:
            self._take_weight(w, assign)
        if bias is not None and assign:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        elif bias is not None:
            self.bias.copy_(bias)

    def _take_weight(self, w: NF4Weight, assign: bool) -> None:
        state = self._state()
        if not assign and [(t.shape, t.dtype) for t in w.state] == [
            (t.shape, t.dtype) for t in state
        ]:
            for ours, theirs in zip(state, w.state):  # in place: tied and shared tensors stay so
                ours.copy_(theirs)
            self.blocksize, self.dtype, self.quant_type = w.blocksize, w.dtype, w.quant_type
        else:
            device = w.device if assign else self.weight.device
            state = [tensor.detach().to(device, copy=not assign) for tensor in w.state]
            self._set(state, w.shape, w.blocksize, w.dtype, w.quant_type)


_PARAMETERS = {name: "weight" if name == "packed" else name for name in STATE_NAMES}
