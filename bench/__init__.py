"""Benches, run by `python -m bench` from the top of the checkout."""
