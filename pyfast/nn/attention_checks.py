"""What the self-attention modules share: sizes, and tokens by heads."""

from torch import Tensor, nn

from pyfast._support import checks
from pyfast.ops.registered.lsh_attention import MAX_DIM


def by_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * dim] as [batch, heads, length, dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def check_tokens(x: object, width: int) -> None:
    """[batch, length, width]"""
    checks.tensor("x", x, checks.FLOATS_AND_DOUBLE)
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [batch, length, {width}]")


def check_decodes(layer: nn.Module) -> None:
    """With a cache there is no dropout."""
    if layer.training and layer.dropout:
        raise ValueError(
            f"cache is given in training with dropout {layer.dropout}; call eval() to decode"
        )


def check_sizes(width, heads, head_dim, value_heads) -> None:
    """Of a module; head_dim and value_heads may be None."""
    sizes = {"width": width, "heads": heads, "head_dim": head_dim, "value_heads": value_heads}
    for name, size in sizes.items():
        if size is not None or name in ("width", "heads"):
            checks.size(name, size)
            if size == 0:
                raise ValueError(f"{name} is 0; it must be at least 1")
    if head_dim is None and width % heads:
        raise ValueError(
            f"width is {width}; without head_dim it must be a multiple of heads, {heads}"
        )
    if (head_dim or width // heads) > MAX_DIM:
        raise ValueError(f"head_dim is {head_dim or width // heads}; it must be at most {MAX_DIM}")
    if value_heads is not None and heads % value_heads:
        raise ValueError(f"value_heads is {value_heads}; it must divide heads, {heads}")
