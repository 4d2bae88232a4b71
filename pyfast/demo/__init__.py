"""The demo of `python -m pyfast demo`: measurements of everything at once, on one page."""
