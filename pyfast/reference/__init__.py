"""Every op in plain torch: specification, judge of the tests, fallback on other devices.

Read it to know what an op computes. It runs in any dtype, float64 included, and saves neither time
nor memory.
"""

from pyfast.reference._adapter import ACTIVATIONS, adapter, adapter_backward_op, adapter_op
from pyfast.reference._chunked import chunked_cross_entropy, chunked_feed_forward
from pyfast.reference._common import dropout_mask, dropout_threshold, philox
from pyfast.reference._lora import (
    lora_expand_backward_op,
    lora_linear,
    lora_linear_backward_op,
    lora_linear_op,
    lora_row_squares_op,
    lora_shrink_backward_op,
    lora_shrink_op,
    multi_lora_linear,
)
from pyfast.reference._lsh_attention import (
    lsh_attention,
    lsh_attention_backward_op,
    lsh_attention_op,
)
from pyfast.reference._lsh_hash import lsh_buckets, lsh_hash_op, lsh_rotations_op, lsh_sort_op
from pyfast.reference._nf4 import (
    check_finite,
    mean_absmax,
    nf4_dequantize,
    nf4_dequantize_op,
    nf4_linear,
    nf4_linear_backward_op,
    nf4_linear_op,
    nf4_quantize,
    nf4_quantize_op,
    nf4_values,
)
from pyfast.reference._reversible import reversible, reversible_step_op

__all__ = [
    "ACTIVATIONS",
    "adapter",
    "adapter_backward_op",
    "adapter_op",
    "check_finite",
    "chunked_cross_entropy",
    "chunked_feed_forward",
    "dropout_mask",
    "dropout_threshold",
    "lora_expand_backward_op",
    "lora_linear",
    "lora_linear_backward_op",
    "lora_linear_op",
    "lora_row_squares_op",
    "lora_shrink_backward_op",
    "lora_shrink_op",
    "lsh_attention",
    "lsh_attention_backward_op",
    "lsh_attention_op",
    "lsh_buckets",
    "lsh_hash_op",
    "lsh_rotations_op",
    "lsh_sort_op",
    "mean_absmax",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_dequantize_op",
    "nf4_linear",
    "nf4_linear_backward_op",
    "nf4_linear_op",
    "nf4_quantize",
    "nf4_quantize_op",
    "nf4_values",
    "philox",
    "reversible",
    "reversible_step_op",
]
