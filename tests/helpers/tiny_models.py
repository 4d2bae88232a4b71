"""Small random models of transformers, one of each common architecture, and batches for them."""

import torch
import transformers as hf

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_NAMES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {"vocab_size": 64, "num_key_value_heads": 2, **_NAMES, **_SIZES}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(tie_word_embeddings=True, **_LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, **_NAMES)
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=64, **_SIZES)),
    "roberta": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(vocab_size=64, **_NAMES, **_SIZES)
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(image_size=16, patch_size=8, **_SIZES)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=64,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ),
}
LAYERS = 2


def make(name, seed=3):
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def batch(name):
    """Return keyword arguments for a model, with labels."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        pixels = torch.randn(3, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1])}
    ids = torch.randint(3, 64, (3, 10), generator=generator)
    if name in ("bert", "roberta"):
        return {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}
    return {"input_ids": ids, "labels": ids}


def logits(model, name):
    with torch.no_grad():
        return model(**batch(name)).logits


def train(model, name, steps=6, lr=0.02):
    """Train a model for a few steps and return the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch(name)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses
