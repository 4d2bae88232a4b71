"""Bench of reversible blocks."""
