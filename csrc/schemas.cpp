// The schemas of all ops in torch.ops.pyfast, by op. The CPU implementations are in ops/, those for
// CUDA in Python (kernels/), except reversible_step, whose CUDA half is in cuda/.
//
// Conventions: `needs` says which of the gradients are asked for; a gradient that is not needed is
// an empty tensor. `seed` and `seeds` are int64 tensors that dropout draws its numbers from.
#include <torch/library.h>

TORCH_LIBRARY(pyfast, m) {
  // NF4. `state` is [packed, absmax, code], or, with quantized scales, [packed, absmax, code,
  // nested_absmax, nested_code, offset]; `shape` is that of the weight.
  m.def(
      "nf4_quantize(Tensor weight, Tensor thresholds, Tensor order, Tensor nested_thresholds, "
      "int blocksize, bool nested) "
      "-> (Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset)");
  m.def(
      "nf4_dequantize(Tensor[] state, SymInt[] shape, int blocksize, ScalarType dtype) -> Tensor");
  m.def(
      "nf4_linear(Tensor x, Tensor[] state, Tensor? bias, SymInt[] shape, int blocksize) "
      "-> Tensor");
  m.def("nf4_linear_backward(Tensor dy, Tensor[] state, SymInt[] shape, int blocksize) -> Tensor");

  // LoRA. `base` is a dense weight, with a blocksize of 0, or an NF4 state. `route` is empty, or
  // [order, starts, scales] where rows have different adapters.
  m.def(
      "lora_shrink(Tensor x, Tensor[] lora_a, float[] scaling, float dropout_p, Tensor? seeds, "
      "Tensor[] route) -> Tensor");
  m.def(
      "lora_linear(Tensor x, Tensor s, Tensor[] base, Tensor lora_b, Tensor? bias, Tensor? gain, "
      "SymInt[] shape, int blocksize, Tensor[] route) -> Tensor");
  m.def(
      "lora_expand_backward(Tensor dy, Tensor s, Tensor lora_b, Tensor? gain, Tensor? z, "
      "float scaling, Tensor[] route, bool[] needs) "
      "-> (Tensor u, Tensor d_lora_b, Tensor sum, Tensor weighted_sum)");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor u, Tensor[] base, Tensor lora_a, Tensor? gain, "
      "Tensor? add, SymInt[] shape, int blocksize, float dropout_p, Tensor? seed, "
      "Tensor[] route) -> Tensor");
  m.def(
      "lora_shrink_backward(Tensor u, Tensor x, int[] ranks, int n, float dropout_p, "
      "Tensor? seeds, Tensor[] route, ScalarType dtype) -> Tensor[]");
  m.def("lora_row_squares(Tensor[] base, SymInt[] shape, int blocksize) -> Tensor");

  // Bottleneck adapter: y = residual + scaling * (act(x down_weight^T + down_bias) up_weight^T +
  // up_bias), in residual's dtype. The residual is x by default. `needs` is of x, down_weight,
  // down_bias, up_weight, up_bias.
  m.def(
      "adapter(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, "
      "Tensor? up_bias, Tensor? residual, str activation, float scaling) -> Tensor");
  m.def(
      "adapter_backward(Tensor dy, Tensor x, Tensor down_weight, Tensor? down_bias, "
      "Tensor up_weight, bool residual_is_x, str activation, float scaling, bool[5] needs) "
      "-> (Tensor dx, Tensor d_down_weight, Tensor d_down_bias, Tensor d_up_weight, "
      "Tensor d_up_bias)");

  // LSH attention. `buckets` are int32 ids [.., n]. `order` holds the positions sorted by (bucket,
  // position) and `ranks` is its inverse; both are [s, b, h, rounds, n] with s = 2 if k is given,
  // else 1. Attention stays within a bucket if buckets are given; duplicates are corrected if ranks
  // are given.
  m.def("lsh_rotations(Tensor seed, SymInt[] shape) -> Tensor");
  m.def("lsh_hash(Tensor x, Tensor rotations, int[] factors) -> Tensor");
  m.def("lsh_sort(Tensor buckets, int n_buckets) -> (Tensor order, Tensor ranks)");
  m.def(
      "lsh_attention(Tensor q, Tensor? k, Tensor v, Tensor order, Tensor? buckets, Tensor? ranks, "
      "Tensor? mask, Tensor? seed, float dropout_p, int chunk_length, float scale, str key_norm, "
      "str wrap, bool causal, bool attend_self, bool mask_queries) -> (Tensor out, Tensor lse)");
  m.def(
      "lsh_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor? k, Tensor v, "
      "Tensor out, Tensor lse, Tensor order, Tensor? buckets, Tensor? ranks, Tensor? mask, "
      "Tensor? seed, float dropout_p, int chunk_length, float scale, str key_norm, str wrap, "
      "bool causal, bool attend_self, bool mask_queries, bool[3] needs) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");

  // Chunked cross-entropy: implemented in Python, with torch's own products.
  m.def(
      "chunked_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
      "int chunk, int ignore_index, bool[3] needs) "
      "-> (Tensor sum, Tensor d_hidden, Tensor d_weight, Tensor d_bias)");

  // Reversible streams: stream += out, or stream -= out, where out is rounded to multiples of
  // 2^-bits unless bits is -1. flag becomes 1 if a sum overflowed and 2 if out was not finite.
  m.def(
      "reversible_step(Tensor(a!) stream, Tensor out, bool subtract, int bits, Tensor(b!) flag) "
      "-> ()");
}
