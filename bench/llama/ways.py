"""The ways to train a Llama that are compared: each makes its model out of the same numbers, and
says its loss.

Adapters are LoRA's, in float32 (PEFT's and pyfast's default), on all linear layers but the head,
with the same numbers in A and zeros in B. What is frozen and not in 4 bits is in bfloat16. Every
way of "nf4" holds the same bytes.
"""

import tempfile

import torch
from torch import Tensor, nn

import pyfast
from bench.llama import shapes
from bench.measure.peer import load, reason
from bench.nf4.peers import BitsAndBytes, Layer

RANK, ALPHA, TARGETS = (
    16,
    32,
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def dense(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def four_bit(weight: Tensor) -> nn.Module:
    """bitsandbytes' layer."""
    return BitsAndBytes().linear4bit(Layer(weight, pyfast.nf4_quantize(weight)))


def four_bit_rounded(weight: Tensor) -> Tensor:
    """What 4 bits leave of it."""
    return pyfast.reference.nf4_dequantize(pyfast.nf4_quantize(weight), torch.bfloat16)


class Way:
    name: str
    base = "dense"  # whose numbers the linear layers have: "nf4" is what 4 bits leave of them
    adapted = True  # or all of it trains
    dtype = torch.bfloat16
    rate = 1e-3  # of AdamW
    needs: tuple[str, ...] = ()

    def missing(self, device: str) -> str | None:
        try:
            for module in self.needs:
                load(module)
        except Exception as error:
            return reason(error)

    def linear(self, weight: Tensor) -> nn.Module:
        return dense(weight)

    def adapt(self, model: nn.Module) -> nn.Module:
        return model

    def model(self, settings, device: str, checkpointing: bool) -> nn.Module:
        model = shapes.build(settings, self.linear, self.dtype, device)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return self.adapt(model)

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss


def _start(model: nn.Module, parts) -> nn.Module:
    """The same A for all; `parts` takes a layer's A and B out of it."""
    adapted = [module for name, module in model.named_modules() if name.endswith(TARGETS)]
    for seed, module in enumerate(adapted):
        a, b = parts(module)
        generator = torch.Generator().manual_seed(seed)
        a.data.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / a.shape[1] ** 0.5)
        b.data.zero_()
    return model


def _peft_parts(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return module.lora_A["default"].weight, module.lora_B["default"].weight


class Full(Way):
    """Everything trains, in bfloat16, AdamW's state too."""

    name = "full"
    adapted = False
    rate = 1e-4
    needs = ("transformers",)

    def adapt(self, model):
        return model.requires_grad_()


class PEFT(Way):
    name = "peft"
    needs = ("transformers", "peft")

    def adapt(self, model):
        peft = load("peft")
        model.is_loaded_in_4bit = self.base == "nf4"
        options = {"lora_dropout": 0.0, "task_type": "CAUSAL_LM", "target_modules": list(TARGETS)}
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options))
        return _start(model, _peft_parts)


class PEFT4Bit(PEFT):
    """Embedding and head in bfloat16: PEFT's prepare_model_for_kbit_training would have them in float32."""

    name = "peft-bnb"
    base = "nf4"
    needs = ("transformers", "peft", "bitsandbytes")

    def linear(self, weight):
        return four_bit(weight)


class Patched(PEFT4Bit):
    """The same after `pyfast.hf.patch`."""

    name = "peft-bnb+patch"

    def adapt(self, model):
        model = super().adapt(model)
        found = load("pyfast.hf").patch(model)
        if found.left:
            raise RuntimeError(str(found))
        return model


class PyFast(Way):
    """With pyfast's loss, which holds the logits of some tokens at a time."""

    name = "pyfast"
    needs = ("transformers",)

    def adapt(self, model):
        pyfast.add_lora(model, pyfast.LoRAConfig(r=RANK, alpha=ALPHA, targets=TARGETS))
        return _start(model, lambda m: (m.adapters["default"].lora_a, m.adapters["default"].lora_b))

    def loss(self, model, ids):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        return pyfast.chunked_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].contiguous())


class PyFast4Bit(PyFast):
    name = "pyfast-nf4"
    base = "nf4"

    def linear(self, weight):
        return pyfast.NF4Linear.from_weight(pyfast.nf4_quantize(weight))


class Unsloth(Way):
    """From files, as it has nothing else."""

    name = "unsloth"
    base = "nf4"
    needs = ("unsloth",)

    def missing(self, device):
        return "needs a GPU" if device == "cpu" else super().missing(device)

    def model(self, settings, device, checkpointing):
        library = load("unsloth").FastLanguageModel
        with tempfile.TemporaryDirectory() as folder:
            # Drawn on the device, as for all, but kept off it: its peak is of what is trained.
            shapes.build(
                settings, lambda weight: dense(weight.cpu()), self.dtype, device
            ).save_pretrained(folder)
            model, _ = library.from_pretrained(folder, dtype=self.dtype, load_in_4bit=True)
        options = {
            "lora_dropout": 0.0,
            "use_gradient_checkpointing": "unsloth" if checkpointing else False,
        }
        model = library.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), **options
        )
        return _start(model, _peft_parts)


class LoRA(nn.Module):
    """As its paper defines it, in plain torch."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.a = nn.Parameter(torch.empty(RANK, base.in_features, **like))
        self.b = nn.Parameter(torch.empty(base.out_features, RANK, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.a.T @ self.b.T)


class Float32(Way):
    """The judge of losses: plain torch in float32, with adapters or all of it trained."""

    dtype = torch.float32
    needs = ("transformers",)

    def __init__(self, base: str, adapted: bool):
        self.base, self.adapted = "dense", adapted
        self.name = f"float32 {base} {'lora' if adapted else 'full'}"
        self.rounded = base == "nf4"

    def linear(self, weight):
        return dense((four_bit_rounded(weight) if self.rounded else weight).float())

    def adapt(self, model):
        model.requires_grad_(not self.adapted)
        if not self.adapted:
            return model
        for name, module in list(model.named_modules()):
            if name.endswith(TARGETS):
                model.set_submodule(name, LoRA(module))
        return _start(model, lambda m: (m.a, m.b))


def judge(way: Way) -> Float32:
    return Float32(way.base, way.adapted)


PEERS = {
    way.name: way
    for way in (Full(), PEFT(), PyFast(), PEFT4Bit(), Patched(), Unsloth(), PyFast4Bit())
}
JUDGES = {own.name: own for own in map(judge, PEERS.values())}
