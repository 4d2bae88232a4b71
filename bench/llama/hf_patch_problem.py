"""PEFT's models before and after `pyfast.hf.patch`: the same numbers in each, and in the
definition's plain layers.

The shape is width x layers. A step is the forward and the backward of the loss of M tokens, to
adapters of r = 16 on every linear layer but the head. GPT-2's linear layers are Conv1D.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.llama import shapes
from bench.llama.ways import ALPHA, RANK, TARGETS, dense, four_bit, four_bit_rounded
from bench.measure.case import BOTH, Case, Made, results
from bench.measure.machine import DTYPES
from bench.measure.peer import Peer, by_name, load, reason

KINDS = ("llama dense", "llama 4-bit", "gpt2 dense")
HEAD = 64


@dataclass(frozen=True)
class Step(Case):
    step: str = BOTH
    kind: str = KINDS[0]
    adapters: str = "fp32"  # their dtype
    dora: bool = False

    op = property(lambda self: f"{'dora' if self.dora else 'lora'} {self.kind}")
    variant = property(lambda self: f"{self.adapters} adapters")

    @property
    def flops(self) -> float:
        """Of the products with frozen weights, forward and backward."""
        return 4.0 * self.m * _frozen(self.kind, *self.size)

    def make(self, peer: "PEFT") -> Made:
        model = peer.model(self)
        return self._made_of(model)

    def _made_of(self, model: nn.Module) -> Made:
        """Of the loss and the logits."""
        ids = shapes.tokens(model.get_base_model().config.vocab_size, 1, self.m, self.device)

        def function() -> tuple[torch.Tensor, torch.Tensor]:
            found = model(input_ids=ids, labels=ids)
            return found.loss, found.logits

        slope = torch.ones(
            (), dtype=torch.promote_types(model.dtype, torch.float32), device=self.device
        )
        return Made(function, [], [slope], held(model), list(trained(model).values()))

    def define(self, dtype):
        def linear(weight: torch.Tensor) -> nn.Module:
            return dense(
                (four_bit_rounded(weight) if self.kind == "llama 4-bit" else weight).to(dtype)
            )

        loss, logits, *grads = self._made_of(adapted(self, linear, dtype)).call(BOTH)()
        return [loss, logits], grads

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        """Adapters of either dtype have the same numbers."""
        return results(self.but(adapters="fp32"), torch.float64)

    @functools.cached_property
    def limit(self) -> float:
        """Twice the error of dense layers of plain torch in this dtype."""
        return 2 * self.error(None, results(self, DTYPES[self.dtype])) + 1e-6

    def error(self, peer, result) -> float:
        """The largest of the loss's, the logits' and any gradient's, as norms."""
        return max(
            ((a.double() - b).norm() / b.norm()).item()
            for a, b in zip(result, self.reference, strict=True)
        )


class PEFT(Peer):
    name = "peft"

    def missing(self, device):
        try:
            for module in ("transformers", "peft", "bitsandbytes"):
                load(module)
        except Exception as error:
            return reason(error)

    def model(self, case: Step) -> nn.Module:
        return adapted(case, four_bit if case.kind == "llama 4-bit" else dense, DTYPES[case.dtype])


class Patched(PEFT):
    """The same model after `pyfast.hf.patch`."""

    name = "pyfast"

    def model(self, case):
        model = super().model(case)
        found = load("pyfast.hf").patch(model)
        if found.left:
            raise RuntimeError(str(found))
        return model


PEERS = by_name(Patched(), PEFT())


def adapted(
    case: Step, linear: Callable[[torch.Tensor], nn.Module], dtype: torch.dtype
) -> nn.Module:
    peft = load("peft")
    gpt2 = case.kind == "gpt2 dense"
    settings = _settings(case.kind, *case.size)
    if gpt2:
        torch.manual_seed(0)
        model, targets = (
            load("transformers").GPT2LMHeadModel(settings),
            ["c_attn", "c_proj", "c_fc"],
        )
        model = model.bfloat16().to(case.device, dtype)
    else:
        model, targets = shapes.build(settings, linear, dtype, case.device), list(TARGETS)
    model.is_loaded_in_4bit = linear is four_bit
    options = {
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": gpt2,
        "use_dora": case.dora,
    }
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options)
    model = peft.get_peft_model(model, config).train()
    own = torch.float64 if dtype == torch.float64 else DTYPES[case.adapters]
    for seed, (name, parameter) in enumerate(trained(model).items()):
        parameter.data = _numbers(name, parameter, seed).to(case.device, own)
    return model


def _numbers(name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Of an adapter, the same for every model and exact in 16 bits; DoRA's magnitudes are near the weights' norms."""
    generator = torch.Generator().manual_seed(seed)
    if "magnitude" in name:
        return torch.rand(parameter.shape, generator=generator).add(0.5).bfloat16()
    width = parameter.shape[1] if "lora_A" in name else parameter.shape[0]
    return (torch.randn(parameter.shape, generator=generator) / width**0.5).bfloat16()


def _settings(kind: str, width: int, layers: int):
    """Of transformers' model; rows of all weights have a norm near 1."""
    heads = max(1, width // HEAD)
    if kind != "gpt2 dense":
        return shapes.settings(width, 11 * width // 4, layers, heads, max(1, heads // 8), 32000)
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    sizes = {"n_embd": width, "n_head": heads, "n_layer": layers, "initializer_range": width**-0.5}
    return load("transformers").GPT2Config(**sizes, **rates, use_cache=False)


@functools.cache
def _frozen(kind: str, width: int, layers: int) -> int:
    """Numbers in the weights that x is multiplied by."""
    with torch.device("meta"):
        model = load("transformers").AutoModelForCausalLM.from_config(
            _settings(kind, width, layers)
        )
    looked_up = ("embed_tokens", "wpe")  # GPT-2's embedding is its head, too
    own = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    return sum(p.numel() for name, p in own.items() if not any(word in name for word in looked_up))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def held(model: nn.Module) -> list[torch.Tensor]:
    """All that the model is made of, scales of 4-bit weights included."""
    tensors = {p.data_ptr(): p for p in model.parameters()}
    for p in list(tensors.values()):
        if state := getattr(p, "quant_state", None):
            inner = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            tensors |= {t.data_ptr(): t for t in (state.absmax, state.code, *inner)}
    return list(tensors.values())
