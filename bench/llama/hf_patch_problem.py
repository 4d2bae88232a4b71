"""Cases and peers of the hf_patch bench: PEFT's models before and after `pyfast.hf.patch`.

All have the same numbers, and so have the plain layers that define the result. The shape is
width x layers. A step is the forward and the backward of the loss of M tokens, to adapters of
r = 16 on every linear layer but the head. GPT-2's linear layers are Conv1D.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.llama import shapes
from bench.llama.methods import (
    ALPHA,
    RANK,
    TARGETS,
    find_missing,
    make_4bit,
    make_dense,
    round_to_4bit,
)
from bench.measure.case import BOTH, Case, Instance, compute_results
from bench.measure.machine import DTYPES
from bench.measure.peer import Peer, index_by_name, load_module
from bench.nf4.peers import held_tensors

ARCHITECTURES = DENSE_LLAMA, LLAMA_4BIT, GPT2 = "llama dense", "llama 4-bit", "gpt2 dense"
HEAD = 64


@dataclass(frozen=True)
class Step(Case):
    """A forward and backward of one model's loss."""

    step: str = BOTH
    architecture: str = DENSE_LLAMA
    adapters: str = "fp32"  # their dtype
    dora: bool = False

    op = property(lambda self: f"{'dora' if self.dora else 'lora'} {self.architecture}")
    variant = property(lambda self: f"{self.adapters} adapters")

    @property
    def flops(self) -> float:
        """FLOPs of the products with frozen weights, forward and backward."""
        return 4.0 * self.m * _count_frozen(self.architecture, *self.size)

    def make(self, peer: "PEFT") -> Instance:
        return self._instance_of(peer.model(self))

    def _instance_of(self, model: nn.Module) -> Instance:
        """Return the instance whose outputs are the loss and the logits."""
        vocabulary = model.get_base_model().config.vocab_size
        ids = shapes.draw_tokens(vocabulary, 1, self.m, self.device)

        def function() -> tuple[torch.Tensor, torch.Tensor]:
            result = model(input_ids=ids, labels=ids)
            return result.loss, result.logits

        dtype = torch.promote_types(model.dtype, torch.float32)
        loss_grad = torch.ones((), dtype=dtype, device=self.device)
        parameters = list(trained_parameters(model).values())
        return Instance(function, [], [loss_grad], all_tensors(model), parameters)

    def define(self, dtype):
        """Compute with dense layers of plain torch."""

        def make_linear(weight: torch.Tensor) -> nn.Module:
            is_4bit = self.architecture == LLAMA_4BIT
            return make_dense((round_to_4bit(weight) if is_4bit else weight).to(dtype))

        instance = self._instance_of(build_adapted(self, make_linear, dtype))
        loss, logits, *grads = instance.make_call(BOTH)()
        return [loss, logits], grads

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        """Results in float64, the same for adapters of either dtype, as their numbers are."""
        return compute_results(self.copy_with(adapters="fp32"), torch.float64)

    @functools.cached_property
    def limit(self) -> float:
        """Twice the error of dense layers of plain torch in this dtype."""
        return 2 * self.error(None, compute_results(self, DTYPES[self.dtype])) + 1e-6

    def error(self, peer, result) -> float:
        """Return the largest error of the loss, the logits and any gradient, as norms."""
        pairs = zip(result, self.reference, strict=True)
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


class PEFT(Peer):
    name = "peft"

    def missing_reason(self, device):
        return find_missing(("transformers", "peft", "bitsandbytes"))

    def model(self, case: Step) -> nn.Module:
        make_linear = make_4bit if case.architecture == LLAMA_4BIT else make_dense
        return build_adapted(case, make_linear, DTYPES[case.dtype])


class Patched(PEFT):
    """The same model after `pyfast.hf.patch`."""

    name = "pyfast"

    def model(self, case):
        model = super().model(case)
        result = load_module("pyfast.hf").patch(model)
        if result.left:
            raise RuntimeError(str(result))
        return model


PEERS = index_by_name(Patched(), PEFT())


def build_adapted(
    case: Step, make_linear: Callable[[torch.Tensor], nn.Module], dtype: torch.dtype
) -> nn.Module:
    """Build PEFT's model of a case, with its linear layers made by `make_linear`."""
    peft = load_module("peft")
    config = _make_config(case.architecture, *case.size)
    if case.architecture == GPT2:
        torch.manual_seed(0)
        model = load_module("transformers").GPT2LMHeadModel(config)
        model, targets = model.bfloat16().to(case.device, dtype), ["c_attn", "c_proj", "c_fc"]
    else:
        model, targets = shapes.build(config, make_linear, dtype, case.device), list(TARGETS)
    model.is_loaded_in_4bit = make_linear is make_4bit
    lora_config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        fan_in_fan_out=case.architecture == GPT2,
        use_dora=case.dora,
    )
    model = peft.get_peft_model(model, lora_config).train()
    adapter_dtype = torch.float64 if dtype == torch.float64 else DTYPES[case.adapters]
    for seed, (name, parameter) in enumerate(trained_parameters(model).items()):
        numbers = _draw_parameter(name, parameter, seed)
        parameter.data = numbers.to(case.device, adapter_dtype)
    return model


def _draw_parameter(name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Return an adapter's numbers, the same for every model and exact in 16 bits.

    DoRA's magnitudes are near the weights' norms.
    """
    generator = torch.Generator().manual_seed(seed)
    if "magnitude" in name:
        return torch.rand(parameter.shape, generator=generator).add(0.5).bfloat16()
    features = parameter.shape[1] if "lora_A" in name else parameter.shape[0]
    return (torch.randn(parameter.shape, generator=generator) / features**0.5).bfloat16()


def _make_config(architecture: str, width: int, layers: int):
    """Return the config of transformers' model; rows of all weights have a norm near 1."""
    heads = max(1, width // HEAD)
    if architecture != GPT2:
        sizes = (width, 11 * width // 4, layers, heads, max(1, heads // 8), 32000)
        return shapes.make_config_of_sizes(*sizes)
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    sizes = {"n_embd": width, "n_head": heads, "n_layer": layers, "initializer_range": width**-0.5}
    return load_module("transformers").GPT2Config(**sizes, **rates, use_cache=False)


@functools.cache
def _count_frozen(architecture: str, width: int, layers: int) -> int:
    """Return how many numbers are in the weights that x is multiplied by."""
    config = _make_config(architecture, width, layers)
    with torch.device("meta"):
        model = load_module("transformers").AutoModelForCausalLM.from_config(config)
    # Tables that are only looked up; GPT-2's embedding is its head, too.
    tables = ("embed_tokens", "wpe")
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and not any(table in name for table in tables)
    )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def all_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return all tensors of the model, scales of 4-bit weights included."""
    tensors = {p.data_ptr(): p for p in model.parameters()}
    for p in list(tensors.values()):
        if state := getattr(p, "quant_state", None):
            tensors |= {t.data_ptr(): t for t in held_tensors(p, state)}
    return list(tensors.values())
