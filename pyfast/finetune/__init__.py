"""The machinery of `python -m pyfast finetune`."""
