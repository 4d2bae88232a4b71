"""Autograd functions and the public functions around them."""
