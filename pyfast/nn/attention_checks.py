"""The checks that self-attention modules share, and their split into heads."""

from torch import Tensor, nn

from pyfast._support import checks
from pyfast.ops import lsh_hash
from pyfast.ops.registered.lsh_attention import MAX_DIM


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape [batch, length, heads * dim] to [batch, heads, length, dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Reshape [batch, heads, length, dim] to [batch, length, heads * dim]."""
    return x.transpose(1, 2).flatten(2)


def check_tokens(x: object, width: int) -> None:
    """Check that x is a floating tensor [batch, length, width]."""
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [batch, length, {width}]")


def check_decoding(layer: nn.Module) -> None:
    """Check that the layer drops nothing, as it must not with a cache."""
    if layer.training and layer.dropout:
        raise ValueError(
            f"cache is given in training with dropout {layer.dropout}; call eval() to decode"
        )


def check_sizes(
    width: object, heads: object, head_dim: object | None, value_heads: object | None
) -> None:
    """Check the sizes of a module; None stands for the default of head_dim or value_heads."""
    _check_positive("width", width)
    _check_positive("heads", heads)
    for name, size in (("head_dim", head_dim), ("value_heads", value_heads)):
        if size is not None:
            _check_positive(name, size)
    if head_dim is None and width % heads:
        raise ValueError(
            f"width is {width}; without head_dim it must be a multiple of heads, {heads}"
        )
    if (head_dim or width // heads) > MAX_DIM:
        raise ValueError(f"head_dim is {head_dim or width // heads}; it must be at most {MAX_DIM}")
    if value_heads is not None and heads % value_heads:
        raise ValueError(f"value_heads is {value_heads}; it must divide heads, {heads}")


def _check_positive(name: str, size: object) -> None:
    checks.size(name, size)
    if size == 0:
        raise ValueError(f"{name} is 0; it must be at least 1")


def check_flags(**flags: object) -> None:
    """Check that the values are bools."""
    for name, flag in flags.items():
        checks.instance(name, flag, bool)


def check_hashing(n_hashes: object, n_buckets: object | None, hash_seed: object | None) -> None:
    """Check the rounds, the numbers of buckets and the seed of a module that hashes."""
    checks.size("n_hashes", n_hashes)
    lsh_hash.check_rounds(n_hashes, None)
    if n_buckets is not None:
        lsh_hash.check_n_buckets(n_buckets)
    lsh_hash.check_hash_seed(hash_seed)
