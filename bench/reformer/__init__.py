"""Benches of whole Reformers: long contexts, learning, duplication."""
