"""Bench of LSH attention."""
