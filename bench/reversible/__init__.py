"""The bench of reversible blocks."""
