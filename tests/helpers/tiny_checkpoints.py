"""Small random checkpoints of transformers, with tokenizers, and texts to train them on."""

import json
import random

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD, BAD = ["good", "fine", "great", "lovely", "warm"], ["bad", "poor", "awful", "cold", "sad"]
REST = [
    "the",
    "a",
    "soup",
    "film",
    "tool",
    "was",
    "is",
    "very",
    "quite",
    "and",
    "train",
    "book",
    "we",
    "it",
]
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
SIZE = {"vocab_size": 32, "max_position_embeddings": 64}


def tokenizer(pads: bool) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*SPECIAL, *GOOD, *BAD, *REST])}
    words_tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    words_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not pads:
        return PreTrainedTokenizerFast(
            tokenizer_object=words_tokenizer, unk_token="[UNK]", eos_token="[SEP]"
        )
    words_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words_tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    )


def bert(dropout=0.0, vocab_size=32):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForMaskedLM(BertConfig(**SIZE | {"vocab_size": vocab_size}, **sizes, **dropouts))


def llama():
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return LlamaForCausalLM(
        LlamaConfig(**SIZE, **sizes, pad_token_id=None, eos_token_id=3, bos_token_id=None)
    )


def gpt2():
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=2, **dropouts)
    config.eos_token_id = config.bos_token_id = 3
    return GPT2LMHeadModel(config)


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}


def write_model(directory, name, **options):
    """Write a checkpoint that transformers reads, and return its path."""
    torch.manual_seed(1)
    MODELS[name](**options).save_pretrained(directory)
    tokenizer(pads=name == "bert").save_pretrained(directory)
    return str(directory)


def sentence(rng, label):
    words = [rng.choice(REST) for _ in range(rng.randint(2, 6))]
    words.insert(rng.randrange(len(words)), rng.choice(GOOD if label == "positive" else BAD))
    return " ".join(words)


def records(count, seed=0):
    rng = random.Random(seed)
    labels = [rng.choice(["positive", "negative"]) for _ in range(count)]
    return [{"text": sentence(rng, label), "label": label} for label in labels]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
