"""What every folder uses: registration of ops, dtypes, checks, notices. Knows no op."""
