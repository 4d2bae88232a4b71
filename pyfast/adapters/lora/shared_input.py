"""Layers that are called on one input (q, k, v; gate, up) and share the pass over it.

A layer that shares its input is opted in by `LoRAConfig(share_inputs=True)`. Within one forward
of the parent module, the first of the layers that is called computes the outputs of all of them.
The outputs are kept until the other layers ask for them, at most until the parent's forward ends.

A kept output is used only if separate layers would compute the same. So the input, every parameter,
every buffer and every setting that the output depends on are compared, by identity and by version.
Otherwise the layer computes by itself. Dropout is never shared: each layer draws its own mask when
it is called.

One difference to separate layers remains, and it is an error, never another number. The layers
are one autograd node, so writing in place to a tensor of one of them, between the forward and the
backward, makes the backward through all of them fail.
"""

import re
import threading
from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pyfast._support import dtypes
from pyfast.adapters.adapter_host import AdapterHost
from pyfast.ops import lora
from pyfast.ops.lora_arguments import Projection

# Types of devices on which layers share. Whole models on the H200, where both variants ran in CUDA
# graphs: 3 and 5 % of the device's time, and 16 to 21 % of the host's launching. Whole models on a
# CPU gain nothing (factors of 0.995 and 0.999).
SHARING_DEVICES = {"cuda"}

# Attributes of transformers' modules whose layers are called on one input.
_NAME_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# In cross-attention, q has another input than k and v.
_CROSS_ATTENTION = re.compile("cross|encoder_attn|encdec", re.IGNORECASE)


class LayerState(NamedTuple):
    """State of a layer: what its output depends on, beside its input."""

    settings: tuple
    tensors: list[Tensor]
    versions: list[tuple] | None  # None of tensors of inference mode, which count no versions

    @classmethod
    def of(cls, settings: tuple, modules: Iterable[nn.Module]) -> "LayerState":
        """Return the state of a layer that computes with the tensors of these modules."""
        tensors = [tensor for module in modules for tensor in _direct_tensors(module)]
        if any(t.is_inference() for t in tensors):
            return cls(settings, tensors, None)
        versions = [(t._version, t.data_ptr(), t.requires_grad) for t in tensors]
        return cls(settings, tensors, versions)

    def is_same(self, other: "LayerState") -> bool:
        if self.settings != other.settings or self.versions != other.versions:
            return False
        if self.versions is None:
            return False
        return all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))


class SharingLayer(Protocol):
    """The attributes that SharedInput needs of a layer."""

    active: str | None
    shared_input: "SharedInput | None"

    def can_share(self, x: Tensor) -> bool:
        """Return whether another layer may compute the output, before anybody asks for it."""

    def projection(self) -> Projection:
        """Return the active adapter and its base."""

    def output_state(self) -> LayerState:
        """Return what the output depends on, beside x."""


class _SharedPass(NamedTuple):
    """Outputs that were computed together and have not been asked for yet."""

    x: Tensor
    settings: tuple
    outputs: dict[int, tuple[Tensor, LayerState]]  # by the layer's id


class _ParentForward:
    """One running forward of the parent, with the shared pass that was made in it."""

    def __init__(self) -> None:
        self.saved_tensors_hooks = _saved_tensors_hooks()
        self.shared_pass: _SharedPass | None = None


class _RunningForward(threading.local):
    """The parent's forward that the current thread runs, or None."""

    forward: _ParentForward | None = None


class SharedInput:
    """A group of layers that their parent calls on one input."""

    def __init__(
        self,
        parent: nn.Module,
        layers: dict[str, SharingLayer],
        adapter_names: Collection[str],
    ) -> None:
        self.layers = layers
        self.adapter_names = frozenset(adapter_names)  # adapters that were made to share
        self._running = _RunningForward()  # threads may call the parent at the same time
        # The hooks bound what is computed ahead: one forward of the parent.
        self._handles = [
            parent.register_forward_pre_hook(self._begin),
            parent.register_forward_hook(self._end, always_call=True),
        ]
        self._join()

    def partners(self, layer: SharingLayer) -> list[str]:
        """Return the names of the layers that this one shares its input with."""
        if layer.active not in self.adapter_names:
            return []
        return [name for name, other in self.sharing_layers().items() if other is not layer]

    def sharing_layers(self) -> dict[str, SharingLayer]:
        """Return the layers, by name, whose active adapter was made to share."""
        layers = self.layers.items()
        return {name: layer for name, layer in layers if layer.active in self.adapter_names}

    def output(self, layer: SharingLayer, x: Tensor) -> Tensor | None:
        """Return the layer's output, or None if the layer must compute it by itself."""
        if torch.compiler.is_compiling() or (forward := self._running.forward) is None:
            return None
        if getattr(layer, "_is_replica", False):  # of nn.DataParallel, in a thread
            return None
        if x.device.type not in SHARING_DEVICES or type(x) not in (Tensor, nn.Parameter):
            return None
        if x.is_inference() or torch._C._are_functorch_transforms_active():
            return None
        if _saved_tensors_hooks() != forward.saved_tensors_hooks:
            return None
        shared_pass = forward.shared_pass
        if shared_pass is None:
            return self._compute(layer, x, forward)
        if shared_pass.x is not x or shared_pass.settings != _settings(x):
            return None
        y, state = shared_pass.outputs.pop(id(layer), (None, None))
        return y if y is not None and state.is_same(layer.output_state()) else None

    def unlink(self) -> None:
        """Dissolve the group: remove its hooks, and let each layer compute by itself."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            layer.shared_input = None

    def _compute(self, layer: SharingLayer, x: Tensor, forward: _ParentForward) -> Tensor | None:
        layers = [other for other in self.sharing_layers().values() if other.can_share(x)]
        if len(layers) < 2 or layer not in layers:
            return None
        states = [other.output_state() for other in layers]
        ys = lora.lora_linears(x, [other.projection() for other in layers])
        outputs = {id(other): (y, state) for other, y, state in zip(layers, ys, states)}
        y, _ = outputs.pop(id(layer))
        forward.shared_pass = _SharedPass(x, _settings(x), outputs)
        return y

    def _begin(self, parent: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self._running.forward = _ParentForward()

    def _end(self, parent: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling():
            self._running.forward = None

    def _join(self) -> None:
        for layer in self.layers.values():
            layer.shared_input = self

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_running"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _running=_RunningForward())
        self._join()  # layers do not copy their group, which would copy the other layers


def sharing_devices() -> str:
    """Return the names of the devices that layers share on, for people to read."""
    return "/".join(sorted(SHARING_DEVICES))


def link(model: nn.Module, layer_type: type, adapter_names: Collection[str]) -> None:
    """Group the layers of this type in the model that have one input, for the named adapters.

    Groups that the model has already are dissolved.
    """
    unlink(model, layer_type)
    if not adapter_names:
        return
    for path, parent in model.named_modules():
        for names in _NAME_GROUPS:
            if len(names) == 3 and _CROSS_ATTENTION.search(path):
                names = names[1:]
            layers = {}
            for name in names:
                layer = _without_bottleneck(parent._modules.get(name), layer_type)
                if isinstance(layer, layer_type):
                    layers[name] = layer
            if len(layers) > 1:
                SharedInput(parent, layers, adapter_names)


def unlink(model: nn.Module, layer_type: type) -> None:
    """Dissolve the groups of the model's layers."""
    for module in model.modules():
        if isinstance(module, layer_type) and module.shared_input is not None:
            module.shared_input.unlink()


def _without_bottleneck(child: nn.Module | None, layer_type: type) -> nn.Module | None:
    is_wrapper = isinstance(child, AdapterHost) and not isinstance(child, layer_type)
    return child.base if is_wrapper else child


def _direct_tensors(module: nn.Module) -> list[Tensor]:
    """Return the module's parameters and buffers, without those of its children."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in tensors if tensor is not None]


def _settings(x: Tensor) -> tuple:
    """Return what the outputs on x depend on, beside the layers and x itself."""
    return (
        x._version,
        x.data_ptr(),
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        dtypes.compute_dtype(x),
        torch.cuda.current_stream(x.device) if x.is_cuda else None,
        x.is_cuda and torch.cuda.is_current_stream_capturing(),
    )


def _saved_tensors_hooks() -> object:
    """Return the hooks that pack what autograd saves.

    A checkpoint packs and recomputes what is saved in its region. So a layer in a region of its
    own must compute by itself, in the forward and again when it is recomputed.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
