"""Small models of transformers, PEFT and bitsandbytes."""

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def bnb_layer(out=24, into=70, *, bias=True, nested=True, quant_type="nf4", dtype=torch.float32):
    """A real Linear4bit, quantized."""
    linear = nn.Linear(into, out, bias=bias, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        into, out, bias, dtype, compress_statistics=nested, quant_type=quant_type
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=nested,
        quant_type=quant_type,
        module=layer,
    )
    layer.bias = linear.bias
    return layer.to("cpu"), linear


def tiny_llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,  # whole blocks in a row: bitsandbytes' AVX-512 code takes them for granted
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


IDS = torch.arange(40).view(2, 20)


def tiny_bert():
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tiny_gpt2():
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)).eval()


def output(model):
    return model(IDS).logits


def quantized_there(make, directory, **options):
    """In training mode: in eval, some CPUs make bitsandbytes repack its weights, with 16-bit scales."""
    plain = make()
    plain.save_pretrained(directory)
    options = {
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "classifier"],
    } | options
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return (
        type(plain).from_pretrained(directory, quantization_config=config, device_map="cpu").train()
    )
