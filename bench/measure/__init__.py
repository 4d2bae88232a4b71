"""Measuring: cases, timing, memory, processes and the machine."""
