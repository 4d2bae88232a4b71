"""The bench of adapters."""
