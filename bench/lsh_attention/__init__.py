"""The bench of LSH attention."""
