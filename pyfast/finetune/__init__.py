"""The machinery of `python -m pyfast finetune` and `predict`: data, models, training, files."""
