"""Bench of NF4 weights and linear layers."""
