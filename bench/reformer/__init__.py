"""Reformers over long contexts."""
