"""The bench of NF4."""
