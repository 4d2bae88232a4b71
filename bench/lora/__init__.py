"""Bench of LoRA and DoRA."""
