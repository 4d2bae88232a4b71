"""Helpers of every folder: registration of ops, dtypes, checks, notices, measurements. They know no op."""
