"""A feed-forward module that runs over chunks of tokens."""

from collections.abc import Callable

from torch import Tensor, nn

from pyfast.ops.chunked import check_chunk, chunked_feed_forward


class ChunkedFeedForward(nn.Module):
    """A feed-forward module that computes `chunk` tokens at a time.

    The result is that of `ff(x)`; the backward computes each chunk again. So the hidden values of
    only one chunk are in memory at a time. See `chunked_feed_forward`.

    Args:
        ff: nn.Module; treats tokens alike and by themselves.
        chunk: int; tokens at a time.
        dim: int, -2 by default; the dimension of the tokens.

    Example:
        >>> import torch, pyfast
        >>> ff = torch.nn.Sequential(
        ...     torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
        ... )
        >>> chunked = pyfast.ChunkedFeedForward(ff, chunk=1024)
        >>> chunked(torch.randn(2, 4096, 64)).shape
        torch.Size([2, 4096, 64])
    """

    def __init__(self, ff: nn.Module, chunk: int, dim: int = -2) -> None:
        super().__init__()
        check_chunk(chunk)
        self.ff, self.chunk, self.dim = ff, chunk, dim

    def forward(self, x: Tensor) -> Tensor:
        """Compute ff(x) in chunks.

        Args:
            x: [..., tokens, width], or with the tokens along `dim`.

        Returns:
            The result of `ff`, with the tokens along the same dimension.
        """
        return chunked_feed_forward(self.ff, x, self.chunk, self.dim)

    def reversible_chunks(self, x: Tensor) -> tuple[Callable, int, list[int]] | None:
        """Return the function, dimension and chunk lengths for reversible blocks.

        These then compute each chunk of x as a call of its own. The result is None where `forward`
        has to be called: in a subclass, and where `dim` is not a dimension of x, to say so.
        """
        if type(self) is not ChunkedFeedForward or not -x.dim() <= self.dim < x.dim():
            return None
        dim = self.dim % x.dim()
        tokens = x.shape[dim]
        starts = range(0, tokens, self.chunk)
        return self.ff, dim, [min(self.chunk, tokens - start) for start in starts]

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, dim={self.dim}"
