"""`python -m pyfast demo`: one page that shows everything at once."""
