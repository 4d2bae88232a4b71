"""Bench of bottleneck adapters."""
