"""What lies in memory or on disk, and how it is read safely."""
