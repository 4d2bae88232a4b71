"""The bench of LoRA."""
