"""How results are presented."""
