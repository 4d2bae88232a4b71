"""A linear layer with a frozen 4-bit weight."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyfast._support import checks, dtypes
from pyfast.formats import bitsandbytes
from pyfast.formats.nf4_weight import STATE_NAMES, NF4Weight, empty_state
from pyfast.ops.nf4 import check_format, check_matrix, nf4_linear_from_state, nf4_quantize
from pyfast.ops.registered.nf4 import Shape, State

# Names of the parameters, by those of NF4Weight's tensors.
_PARAMETERS = {name: "weight" if name == "packed" else name for name in STATE_NAMES}


class NF4Linear(nn.Module):
    """A linear layer with a frozen 4-bit weight.

    `NF4Linear(in_features, out_features)` is a layer of zeros, to load a checkpoint into;
    `from_linear` makes one from a layer. `state_dict` has bitsandbytes' keys. Checkpoints of
    bitsandbytes load here strictly, and those of this layer load there.

    The scales stay float32 whatever `.to(dtype)` says. `bias` is an ordinary parameter.

    Args:
        in_features: int; the size of the input.
        out_features: int; the size of the output.
        bias: bool, True by default; whether there is a bias.
        blocksize: int, 64 by default; the number of values that share a scale. A power of two, 32
            to 4096.
        nested: bool, True by default; quantize the scales too, to 8 bits.
        quant_type: "nf4" (the default) or "fp4".
        dtype: float32, bfloat16 or float16; the dtype of the bias, and the one that the weight was
            quantized from. torch's default.
        device: device of the parameters; torch's default.

    Example:
        >>> import torch, pyfast
        >>> layer = pyfast.NF4Linear.from_linear(torch.nn.Linear(256, 128))
        >>> layer
        NF4Linear(in_features=256, out_features=128, bias=True, nf4, blocksize=64, nested=True)
        >>> layer(torch.randn(10, 256)).shape
        torch.Size([10, 128])
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
        super().__init__()
        check_format(blocksize, nested, quant_type)
        checks.size("in_features", in_features)
        checks.size("out_features", out_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        checks.one_of("dtype", dtype, checks.FLOATS)
        shape = (out_features, in_features)
        state = empty_state(shape, blocksize, quant_type, nested, device)
        self._set_weight(state, shape, blocksize, dtype, quant_type)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, blocksize: int = 64, nested: bool = True, quant_type: str = "nf4"
    ) -> "NF4Linear":
        """Quantize the weight of a layer.

        Args:
            linear: nn.Linear; its weight is float32, bfloat16 or float16.
            blocksize: int, 64 by default; the number of values that share a scale.
            nested: bool, True by default; quantize the scales too, to 8 bits.
            quant_type: "nf4" (the default) or "fp4".

        Returns:
            A new NF4Linear, whose bias is the same parameter as the layer's.
        """
        checks.instance("linear", linear, nn.Linear)
        w = nf4_quantize(linear.weight, blocksize=blocksize, nested=nested, quant_type=quant_type)
        return cls.from_weight(w, linear.bias).train(linear.training)

    @classmethod
    def from_weight(cls, w: NF4Weight, bias: Tensor | None = None) -> "NF4Linear":
        """Make a layer of a quantized weight.

        Args:
            w: NF4Weight of shape [out_features, in_features].
            bias: [out_features]; a parameter is used as it is, another tensor becomes one.

        Returns:
            A new NF4Linear that shares the tensors of `w`.
        """
        checks.instance("w", w, NF4Weight)
        check_matrix(w)
        if bias is not None:
            checks.tensor("bias", bias, checks.FLOATS_AND_DOUBLE)
            checks.shape("bias", bias, w.shape[:1])
            bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_weight(w.state, w.shape, w.blocksize, w.dtype, w.quant_type)
        layer.bias = bias
        return layer

    def _set_weight(
        self, state: State, shape: Shape, blocksize: int, dtype: torch.dtype, quant_type: str
    ) -> None:
        # Frozen parameters, not buffers: DDP would broadcast buffers at every step.
        for name in STATE_NAMES:
            self.register_parameter(_PARAMETERS[name], None)
        for name, tensor in zip(STATE_NAMES, state):  # the first half only, unless nested
            self.register_parameter(_PARAMETERS[name], nn.Parameter(tensor, requires_grad=False))
        self.out_features, self.in_features = shape
        self.blocksize, self.dtype, self.quant_type = blocksize, dtype, quant_type

    def _state(self) -> State:
        """Return the weight's tensors in the order of STATE_NAMES."""
        state = [self.weight, self.absmax, self.code]
        return [*state, self.nested_absmax, self.nested_code, self.offset] if self.nested else state

    @property
    def nested(self) -> bool:
        """Return whether the scales are quantized too."""
        return self.offset is not None

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight as an NF4Weight that shares this layer's tensors."""
        tensors = dict(zip(STATE_NAMES, (parameter.detach() for parameter in self._state())))
        return NF4Weight(
            shape=(self.out_features, self.in_features),
            blocksize=self.blocksize,
            dtype=self.dtype,
            quant_type=self.quant_type,
            **tensors,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias, differentiable in x and bias.

        Args:
            x: [..., in_features]; float32, bfloat16, float16, or float64 on the CPU.

        Returns:
            [..., out_features], in x's dtype or autocast's.
        """
        bias = self.bias
        if bias is not None and isinstance(x, Tensor):
            bias = bias.to(dtypes.compute_dtype(x))
        shape = (self.out_features, self.in_features)
        return nf4_linear_from_state(x, self._state(), bias, shape, self.blocksize)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        options = f"blocksize={self.blocksize}, nested={self.nested}"
        return f"{sizes}, bias={self.bias is not None}, {self.quant_type}, {options}"

    def _apply(self, fn, recurse: bool = True):
        weight_ids = {id(tensor) for tensor in self._state()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in weight_ids and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination.update(bitsandbytes.bitsandbytes_entries(self.nf4_weight, prefix + "weight"))
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Load all entries or none: each is read and checked before any is copied."""
        args = (state_dict, prefix, local_metadata, strict)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(*args, missing_keys, unexpected_keys, error_msgs)
        weight_key, bias_key = prefix + "weight", prefix + "bias"
        entries = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        required = {weight_key} | ({bias_key} if self.bias is not None else set())
        if strict:
            expected = bitsandbytes.bitsandbytes_keys(entries, weight_key) | required
            children = tuple(f"{prefix}{name}." for name in self._modules)
            extra = sorted(set(entries) - expected)
            unexpected_keys += [key for key in extra if not key.startswith(children)]
            missing_keys += sorted(required - set(entries))
        bias = entries.get(bias_key) if self.bias is not None else None
        try:
            w = self._read_weight(entries, weight_key) if weight_key in entries else None
            if bias is not None:
                checks.tensor(bias_key, bias, checks.FLOATS_AND_DOUBLE)
                checks.shape(bias_key, bias, (self.out_features,))
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))
            return
        self._load(w, bias, assign=local_metadata.get("assign_to_params_buffers", False))

    def _read_weight(self, entries: Mapping[str, Tensor], key: str) -> NF4Weight:
        w = bitsandbytes.read_bitsandbytes(entries, key)
        shape = (self.out_features, self.in_features)
        if w.shape != shape:
            raise ValueError(f"{key} is of shape {list(w.shape)}; this layer's is {list(shape)}")
        return w

    @torch.no_grad()
    def _load(self, w: NF4Weight | None, bias: Tensor | None, assign: bool) -> None:
        if self.weight.is_meta and not assign:
            warnings.warn(
                "a layer on the meta device loads nothing; pass assign=True to load_state_dict",
                stacklevel=2,
            )
            return
        if w is not None:
            self._load_weight(w, assign)
        if bias is not None and assign:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        elif bias is not None:
            self.bias.copy_(bias)

    def _load_weight(self, w: NF4Weight, assign: bool) -> None:
        state = self._state()
        formats = [(tensor.shape, tensor.dtype) for tensor in state]
        if not assign and [(tensor.shape, tensor.dtype) for tensor in w.state] == formats:
            # In place, so that tied and shared tensors stay so.
            for parameter, tensor in zip(state, w.state):
                parameter.copy_(tensor)
            self.blocksize, self.dtype, self.quant_type = w.blocksize, w.dtype, w.quant_type
        else:
            device = w.device if assign else self.weight.device
            state = [tensor.detach().to(device, copy=not assign) for tensor in w.state]
            self._set_weight(state, w.shape, w.blocksize, w.dtype, w.quant_type)
