"""A feed-forward that runs over chunks of tokens."""

from torch import Tensor, nn

from pyfast.ops.chunked import check_chunk, chunked_feed_forward


class ChunkedFeedForward(nn.Module):
    """A feed-forward module in chunks: `ChunkedFeedForward(ff, 1024)(x)`."""

    def __init__(self, ff: nn.Module, chunk: int, dim: int = -2) -> None:
        super().__init__()
        check_chunk(chunk)
        self.ff, self.chunk, self.dim = ff, chunk, dim

    def forward(self, x: Tensor) -> Tensor:
        """ff(x)."""
        return chunked_feed_forward(self.ff, x, self.chunk, self.dim)

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, dim={self.dim}"
