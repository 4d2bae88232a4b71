"""The commands: `python -m pyfast info | selftest | demo | finetune | predict`."""
