"""LoRA and DoRA layers."""
