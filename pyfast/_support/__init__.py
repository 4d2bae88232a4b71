"""Helpers of every folder: registration, dtypes, checks, notices, measurements. They know no op."""
