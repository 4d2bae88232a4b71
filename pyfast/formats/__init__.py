"""Formats of tensors in memory and on disk, with readers that trust no file."""
