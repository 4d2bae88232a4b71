"""PEFT's models before and after `pyfast.hf.patch`: the same numbers in each, and in the judge's, in float64."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import pyfast
from bench import llama
from bench.llama_ways import ALPHA, RANK, TARGETS, dense
from bench.machine import DTYPES
from bench.peers import BitsAndBytes, Layer, Peer, load, reason

KINDS = ("llama dense", "llama 4-bit", "gpt2 dense")  # GPT-2's linear layers are Conv1D


@dataclass(frozen=True)
class Problem:
    """A model of PEFT's, and what it reads."""

    kind: str
    shape: str  # one of llama.SHAPES; GPT-2's width is that of "medium", or of a toy
    layers: int
    tokens: int
    dtype: str
    adapters: str  # their dtype
    dora: bool
    device: str

    @property
    def toy(self) -> bool:
        return self.shape == "toy"

    @property
    def size(self) -> str:
        return "medium" if "gpt2" in self.kind and not self.toy else self.shape

    @property
    def exact(self) -> "Problem":
        """Its judge's: adapters of either dtype have the same numbers."""
        return replace(self, dtype="fp64", adapters="fp64")


class PEFT(Peer):
    name = "peft"

    def missing(self, device):
        try:
            for module in ("transformers", "peft", "bitsandbytes"):
                load(module)
        except Exception as error:
            return reason(error)

    def model(self, problem: Problem) -> nn.Module:
        return adapted(problem, _four_bit if problem.kind == "llama 4-bit" else dense, DTYPES[problem.dtype])


class Patched(PEFT):
    """The same model after `pyfast.hf.patch`."""

    name = "pyfast"

    def model(self, problem):
        model = super().model(problem)
        found = load("pyfast.hf").patch(model)
        if found.left:
            raise RuntimeError(str(found))
        return model


PEERS = {peer.name: peer for peer in (Patched(), PEFT())}


def _four_bit(weight: torch.Tensor) -> nn.Module:
    return BitsAndBytes().module(Layer(weight, pyfast.nf4_quantize(weight)))


def plain(problem: Problem, dtype: torch.dtype) -> nn.Module:
    """Of dense layers of plain torch, whose weights are what 4 bits leave if the problem's are."""

    def linear(weight: torch.Tensor) -> nn.Module:
        if problem.kind == "llama 4-bit":
            weight = pyfast.reference.nf4_dequantize(pyfast.nf4_quantize(weight), torch.bfloat16)
        return dense(weight.to(dtype))

    return adapted(problem, linear, dtype)


def adapted(problem: Problem, linear, dtype: torch.dtype) -> nn.Module:
    peft = load("peft")
    if problem.kind == "gpt2 dense":
        model, targets = _gpt2(problem).to(problem.device, dtype), ["c_attn", "c_proj", "c_fc"]
    else:
        settings = llama.config(problem.shape, problem.layers)
        model, targets = llama.build(settings, linear, dtype, problem.device), list(TARGETS)
    model.is_loaded_in_4bit = linear is _four_bit
    options = {"lora_dropout": 0.0, "task_type": "CAUSAL_LM", "fan_in_fan_out": problem.kind == "gpt2 dense"}
    options |= {"use_dora": problem.dora, "target_modules": targets}
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options)).train()
    wide = torch.float64 if dtype == torch.float64 else DTYPES[problem.adapters]
    for seed, (name, parameter) in enumerate(trained(model).items()):
        parameter.data = _numbers(name, parameter, seed).to(problem.device, wide)
    return model


def _numbers(name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Of an adapter, the same for every model and exact in 16 bits; DoRA's magnitudes are near what they begin as."""
    generator = torch.Generator().manual_seed(seed)
    if "magnitude" in name:
        return torch.rand(parameter.shape, generator=generator).add(0.5).bfloat16()
    width = parameter.shape[1] if "lora_A" in name else parameter.shape[0]
    return (torch.randn(parameter.shape, generator=generator) / width**0.5).bfloat16()


def _gpt2(problem: Problem) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    width, heads, vocabulary = (64, 4, 256) if problem.toy else (1024, 16, 50257)
    sizes = {"n_embd": width, "n_head": heads, "vocab_size": vocabulary, "n_layer": problem.layers}
    sizes |= {"initializer_range": width**-0.5}
    torch.manual_seed(0)
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, use_cache=False)).bfloat16()


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


def loss(model: nn.Module, problem: Problem):
    """And the logits with it."""
    vocabulary = model.get_base_model().config.vocab_size
    ids = llama.tokens(vocabulary, 1, problem.tokens, problem.device)
    return model(input_ids=ids, labels=ids)


def step(model: nn.Module, problem: Problem) -> Callable[[], list[torch.Tensor]]:
    """A call that gives logits and gradients."""
    parameters = list(trained(model).values())

    def call() -> list[torch.Tensor]:
        found = loss(model, problem)
        return [found.logits.detach(), *torch.autograd.grad(found.loss, parameters)]

    return call


@dataclass
class Exact:
    result: list[torch.Tensor]
    flops: float  # of the products with frozen weights, forward and backward


@functools.lru_cache(maxsize=1)
def exact(problem: Problem) -> Exact:
    """In float64."""
    model = plain(problem, torch.float64)
    inside = ("lora_", "embed_tokens", "wpe")  # but GPT-2's embedding is its head, too
    weights = [p for n, p in model.named_parameters() if p.dim() == 2 and not any(word in n for word in inside)]
    return Exact(step(model, problem)(), 4.0 * problem.tokens * sum(p.numel() for p in weights))
