"""Bottleneck adapters by Houlsby et al. and Pfeiffer et al."""
