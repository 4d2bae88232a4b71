"""Houlsby's and Pfeiffer's adapters."""
