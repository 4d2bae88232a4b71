"""Methods of training a Llama that are compared: each builds its model and computes its loss.

All models are built of the same numbers. Adapters are LoRA's, in float32 (PEFT's and pyfast's
default), on all linear layers but the head, with the same numbers in A and zeros in B. Frozen
weights that are not in 4 bits are in bfloat16. Every method over "nf4" holds the same bytes.
"""

import tempfile

import torch
from torch import Tensor, nn

import pyfast
from bench.llama import shapes
from bench.measure.peer import describe_error, load_module
from bench.nf4.layer import Layer
from bench.nf4.peers import BitsAndBytes

RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_dense(weight: Tensor) -> nn.Linear:
    """Return a frozen nn.Linear of a weight."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def make_4bit(weight: Tensor) -> nn.Module:
    """Return bitsandbytes' layer of a weight."""
    return BitsAndBytes().linear4bit(Layer(weight, pyfast.nf4_quantize(weight)))


def round_to_4bit(weight: Tensor) -> Tensor:
    """Return the weight as 4 bits hold it."""
    return pyfast.reference.nf4_dequantize(pyfast.nf4_quantize(weight), torch.bfloat16)


def find_missing(modules: tuple[str, ...]) -> str | None:
    """Return why one of the modules cannot be imported, or None if all can."""
    try:
        for module in modules:
            load_module(module)
    except Exception as error:
        return describe_error(error)


class TrainingMethod:
    """Base class; a subclass overrides the parts that differ from a dense model in bfloat16."""

    name: str
    base = "dense"  # the linear layers' numbers; "nf4" are those that 4 bits hold
    has_adapters = True  # otherwise all parameters train
    dtype = torch.bfloat16
    rate = 1e-3  # of AdamW
    modules: tuple[str, ...] = ()  # that it imports

    def missing_reason(self, device: str) -> str | None:
        return find_missing(self.modules)

    def linear(self, weight: Tensor) -> nn.Module:
        return make_dense(weight)

    def adapt(self, model: nn.Module) -> nn.Module:
        return model

    def model(self, config, device: str, checkpointing: bool) -> nn.Module:
        model = shapes.build(config, self.linear, self.dtype, device)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return self.adapt(model)

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss


def _initialize(model: nn.Module, get_parameters) -> nn.Module:
    """Set the same A for all methods; `get_parameters` returns a layer's A and B."""
    layers = [module for name, module in model.named_modules() if name.endswith(TARGETS)]
    for seed, module in enumerate(layers):
        a, b = get_parameters(module)
        generator = torch.Generator().manual_seed(seed)
        a.data.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / a.shape[1] ** 0.5)
        b.data.zero_()
    return model


def _peft_parameters(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return module.lora_A["default"].weight, module.lora_B["default"].weight


class Full(TrainingMethod):
    """Training of all parameters in bfloat16; AdamW's state is in bfloat16, too."""

    name = "full"
    has_adapters = False
    rate = 1e-4
    modules = ("transformers",)

    def adapt(self, model):
        return model.requires_grad_()


class PEFT(TrainingMethod):
    """PEFT's LoRA."""

    name = "peft"
    modules = ("transformers", "peft")

    def adapt(self, model):
        peft = load_module("peft")
        model.is_loaded_in_4bit = self.base == "nf4"
        options = {"lora_dropout": 0.0, "task_type": "CAUSAL_LM", "target_modules": list(TARGETS)}
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options))
        return _initialize(model, _peft_parameters)


class PEFT4Bit(PEFT):
    """PEFT's LoRA over bitsandbytes' layers.

    Embedding and head are in bfloat16; PEFT's prepare_model_for_kbit_training would cast them to
    float32.
    """

    name = "peft-bnb"
    base = "nf4"
    modules = ("transformers", "peft", "bitsandbytes")

    def linear(self, weight):
        return make_4bit(weight)


class Patched(PEFT4Bit):
    """The same model after `pyfast.hf.patch`."""

    name = "peft-bnb+patch"

    def adapt(self, model):
        model = super().adapt(model)
        result = load_module("pyfast.hf").patch(model)
        if result.left:
            raise RuntimeError(str(result))
        return model


class PyFast(TrainingMethod):
    """pyfast's LoRA, and its loss, which holds the logits of some tokens at a time."""

    name = "pyfast"
    modules = ("transformers",)

    def adapt(self, model):
        # Layers share on CUDA only; elsewhere they are computed separately all the same.
        config = pyfast.LoRAConfig(r=RANK, alpha=ALPHA, targets=TARGETS, share_inputs=True)
        pyfast.add_lora(model, config)

        def get_parameters(module):
            adapter = module.adapters["default"]
            return adapter.lora_a, adapter.lora_b

        return _initialize(model, get_parameters)

    def loss(self, model, ids):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        return pyfast.chunked_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].contiguous())


class PyFast4Bit(PyFast):
    """pyfast's LoRA over NF4Linear."""

    name = "pyfast-nf4"
    base = "nf4"

    def linear(self, weight):
        return pyfast.NF4Linear.from_weight(pyfast.nf4_quantize(weight))


class Unsloth(TrainingMethod):
    """unsloth's LoRA; its model is read from files, since unsloth takes nothing else."""

    name = "unsloth"
    base = "nf4"
    modules = ("unsloth",)

    def missing_reason(self, device):
        return "needs a GPU" if device == "cpu" else super().missing_reason(device)

    def model(self, config, device, checkpointing):
        library = load_module("unsloth").FastLanguageModel
        with tempfile.TemporaryDirectory() as folder:
            # Drawn on the device, as for all, but kept off it: its peak is that of the training.
            dense = shapes.build(
                config, lambda weight: make_dense(weight.cpu()), self.dtype, device
            )
            dense.save_pretrained(folder)
            del dense
            model, _ = library.from_pretrained(folder, dtype=self.dtype, load_in_4bit=True)
        options = {
            "lora_dropout": 0.0,
            "use_gradient_checkpointing": "unsloth" if checkpointing else False,
        }
        model = library.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), **options
        )
        return _initialize(model, _peft_parameters)


class LoRA(nn.Module):
    """LoRA as its paper defines it, in plain torch."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        options = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.a = nn.Parameter(torch.empty(RANK, base.in_features, **options))
        self.b = nn.Parameter(torch.empty(base.out_features, RANK, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.a.T @ self.b.T)


class Float32(TrainingMethod):
    """Plain torch in float32, whose losses the others are checked against."""

    dtype = torch.float32
    modules = ("transformers",)

    def __init__(self, base: str, has_adapters: bool):
        self.base, self.has_adapters = "dense", has_adapters
        self.name = f"float32 {base} {'lora' if has_adapters else 'full'}"
        self.is_rounded = base == "nf4"

    def linear(self, weight):
        return make_dense((round_to_4bit(weight) if self.is_rounded else weight).float())

    def adapt(self, model):
        model.requires_grad_(not self.has_adapters)
        if not self.has_adapters:
            return model
        for name, module in list(model.named_modules()):
            if name.endswith(TARGETS):
                model.set_submodule(name, LoRA(module))
        return _initialize(model, lambda module: (module.a, module.b))


def float32_method(method: TrainingMethod) -> Float32:
    """Return the method whose losses are expected of another one."""
    return Float32(method.base, method.has_adapters)


METHODS = Full(), PEFT(), PyFast(), PEFT4Bit(), Patched(), Unsloth(), PyFast4Bit()
PEERS = {method.name: method for method in METHODS}
FLOAT32_METHODS = {method.name: method for method in map(float32_method, METHODS)}
