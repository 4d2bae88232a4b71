"""Benches of whole Llamas, and of PEFT's models patched."""
