"""The Reformer: LSH attention, reversible layers, chunked feed-forward."""
