"""Modules around the ops."""
