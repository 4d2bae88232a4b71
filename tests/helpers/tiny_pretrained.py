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


def bnb_layer(
    out_features=24,
    in_features=70,
    *,
    bias=True,
    nested=True,
    quant_type="nf4",
    dtype=torch.float32,
):
    """Return a quantized Linear4bit, and the nn.Linear it was made of."""
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias, dtype, compress_statistics=nested, quant_type=quant_type
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
            # Whole blocks in each row: bitsandbytes' AVX-512 code takes that for granted.
            intermediate_size=128,
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


def load_with_bitsandbytes(make, directory, **options):
    """Save a model, and load it with bitsandbytes' 4-bit layers, in training mode.

    In eval mode bitsandbytes repacks its weights on some CPUs, with 16-bit scales.
    """
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
