"""LoRA and bottleneck adapters in a pretrained model, changed in place."""
