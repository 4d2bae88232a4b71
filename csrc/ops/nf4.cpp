// The ops: schemas, and CPU implementations of NF4's (others': <op>_ops.cpp) that check what the
// kernels' memory safety rests on and hand over raw pointers. Friendlier checks of user input are
// Python's (pyfast/_support/checks.py).
#include "ops/checks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/linear/linear.h"

namespace pyfast {
namespace {

constexpr int64_t kNestedBlocksize = 256;

void check_blocksize(int64_t blocksize) {
  const bool power_of_two = (blocksize & (blocksize - 1)) == 0;
  TORCH_CHECK_VALUE(blocksize >= 32 && blocksize <= 4096 && power_of_two, "blocksize is ",
                    blocksize, "; it must be a power of two, 32 to 4096");
}

}  // namespace

cpu::DType dtype_of(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat: return cpu::DType::f32;
    case at::kBFloat16: return cpu::DType::bf16;
    case at::kHalf: return cpu::DType::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " is ", c10::toString(type),
                       "; it must be float32, bfloat16 or float16");
  }
}

uint32_t dropout_threshold(double p) {
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "dropout_p is ", p, "; it must be at least 0 and below 1");
  return uint32_t(std::min(std::nearbyint(p * 65536), 65535.0));
}

void check_vector(const Tensor& tensor, const char* name, at::ScalarType type, int64_t numel) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(),
                   "; it must be ", type);
  TORCH_CHECK_VALUE(tensor.numel() == numel, name, " has ", tensor.numel(),
                    " elements; it must have ", numel);
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.is_cpu(), name,
                    " must be contiguous and on the CPU");
}

cpu::NF4View view_of(at::TensorList state, int64_t rows, int64_t cols, int64_t blocksize) {
  TORCH_CHECK_VALUE(state.size() == 3 || state.size() == 6,
                    "a state holds 3 tensors, nested 6, not ", state.size());
  check_blocksize(blocksize);
  TORCH_CHECK_VALUE(rows >= 0 && cols >= 0, "shape is [", rows, ", ", cols,
                    "]; sizes must not be negative");
  const bool nested = state.size() == 6;
  const int64_t blocks = ceil_div(rows * cols, blocksize);
  check_vector(state[0], "packed", at::kByte, ceil_div(rows * cols, 2));
  check_vector(state[1], "absmax", nested ? at::kByte : at::kFloat, blocks);
  check_vector(state[2], "code", at::kFloat, 16);
  cpu::NF4View view{};
  view.packed = state[0].const_data_ptr<uint8_t>();
  view.code = state[2].const_data_ptr<float>();
  view.rows = rows, view.cols = cols, view.blocksize = blocksize;
  if (!nested) {
    view.absmax = state[1].const_data_ptr<float>();
    return view;
  }
  check_vector(state[3], "nested_absmax", at::kFloat, ceil_div(blocks, kNestedBlocksize));
  check_vector(state[4], "nested_code", at::kFloat, 256);
  check_vector(state[5], "offset", at::kFloat, 1);
  view.absmax_code = state[1].const_data_ptr<uint8_t>();
  view.nested_absmax = state[3].const_data_ptr<float>();
  view.nested_code = state[4].const_data_ptr<float>();
  view.offset = *state[5].const_data_ptr<float>();
  return view;
}

cpu::NF4View matrix_of(at::TensorList state, at::IntArrayRef shape, int64_t blocksize) {
  TORCH_CHECK_VALUE(shape.size() == 2, "shape is ", shape, "; a linear layer's is [out, in]");
  return view_of(state, shape[0], shape[1], blocksize);
}

std::tuple<Tensor, Tensor> rows_and_result(const Tensor& x, const char* name, int64_t from,
                                           int64_t to) {
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == from, name, " has shape ", x.sizes(),
                    "; its last dimension must be ", from);
  auto sizes = x.sizes().vec();
  sizes.back() = to;
  return {x.contiguous(), at::empty(sizes, x.options())};
}

namespace {

void check_finite(const float* scales, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= std::isfinite(scales[i]);
  TORCH_CHECK_VALUE(
      finite,
      "weight holds NaN, infinite or overflowing values; it must be finite to be quantized");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nf4_quantize(const Tensor& weight,
                                                        const Tensor& thresholds,
                                                        const Tensor& order,
                                                        const Tensor& nested_thresholds,
                                                        int64_t blocksize, bool nested) {
  check_blocksize(blocksize);
  check_vector(thresholds, "thresholds", at::kFloat, 15);
  check_vector(order, "order", at::kByte, 16);
  check_vector(nested_thresholds, "nested_thresholds", at::kFloat, 255);
  const auto dtype = dtype_of(weight.scalar_type(), "weight");
  const Tensor flat = weight.contiguous();
  const int64_t numel = flat.numel(), blocks = ceil_div(numel, blocksize);
  const auto floats = at::device(at::kCPU).dtype(at::kFloat),
             bytes = at::device(at::kCPU).dtype(at::kByte);
  Tensor packed = at::empty({ceil_div(numel, 2), 1}, bytes), absmax = at::empty({blocks}, floats);
  cpu::nf4_quantize(flat.const_data_ptr(), dtype, numel, blocksize,
                    thresholds.const_data_ptr<float>(), order.const_data_ptr<uint8_t>(),
                    packed.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>());
  if (!nested) {
    check_finite(absmax.const_data_ptr<float>(), blocks);
    return {packed, absmax, at::empty({0}, floats), at::empty({0}, floats)};
  }
  // torch's own mean: bitsandbytes' offset is its bits.
  Tensor offset = blocks ? at::mean(absmax).view({1}) : at::zeros({1}, floats);
  check_finite(offset.const_data_ptr<float>(), 1);
  Tensor codes = at::empty({blocks}, bytes),
         nested_absmax = at::empty({ceil_div(blocks, kNestedBlocksize)}, floats);
  cpu::nf4_quantize_scales(absmax.const_data_ptr<float>(), blocks, *offset.const_data_ptr<float>(),
                           nested_thresholds.const_data_ptr<float>(),
                           codes.mutable_data_ptr<uint8_t>(),
                           nested_absmax.mutable_data_ptr<float>());
  return {packed, codes, nested_absmax, offset};
}

Tensor nf4_dequantize(at::TensorList state, at::IntArrayRef shape, int64_t blocksize,
                      at::ScalarType dtype) {
  const auto view = view_of(state, 1, c10::multiply_integers(shape), blocksize);
  const auto kernel_dtype = dtype_of(dtype, "dtype");
  Tensor out = at::empty(shape, at::device(at::kCPU).dtype(dtype));
  cpu::nf4_dequantize(view, kernel_dtype, out.mutable_data_ptr());
  return out;
}

// For gradcheck: no kernel computes in float64.
Tensor double_weight(at::TensorList state, at::IntArrayRef shape, int64_t blocksize) {
  return nf4_dequantize(state, shape, blocksize, at::kFloat).to(at::kDouble);
}

Tensor nf4_linear(const Tensor& x, at::TensorList state, const std::optional<Tensor>& bias,
                  at::IntArrayRef shape, int64_t blocksize) {
  const auto view = matrix_of(state, shape, blocksize);
  auto [rows, y] = rows_and_result(x, "x", view.cols, view.rows);
  if (bias) check_vector(bias->contiguous(), "bias", x.scalar_type(), view.rows);
  if (x.scalar_type() == at::kDouble)
    return at::linear(x, double_weight(state, shape, blocksize), bias);
  const Tensor bias_values = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  cpu::Linear p{
      {dtype_of(x.scalar_type(), "x")}, rows.const_data_ptr(), y.mutable_data_ptr(), row_count(x)};
  p.bias = bias ? bias_values.const_data_ptr<float>() : nullptr;
  cpu::linear(cpu::Base(view), p);
  return y;
}

Tensor nf4_linear_backward(const Tensor& dy, at::TensorList state, at::IntArrayRef shape,
                           int64_t blocksize) {
  const auto view = matrix_of(state, shape, blocksize);
  auto [rows, dx] = rows_and_result(dy, "dy", view.rows, view.cols);
  if (dy.scalar_type() == at::kDouble)
    return at::matmul(dy, double_weight(state, shape, blocksize));
  cpu::LinearBackward p{{dtype_of(dy.scalar_type(), "dy")},
                        rows.const_data_ptr(),
                        dx.mutable_data_ptr(),
                        row_count(dy)};
  cpu::linear_backward(cpu::Base(view), p);
  return dx;
}

}  // namespace

TORCH_LIBRARY(pyfast, m) {
  m.def(
      "nf4_quantize(Tensor weight, Tensor thresholds, Tensor order, Tensor nested_thresholds, int "
      "blocksize, "
      "bool nested) -> (Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset)");
  m.def(
      "nf4_dequantize(Tensor[] state, SymInt[] shape, int blocksize, ScalarType dtype) -> Tensor");
  m.def(
      "nf4_linear(Tensor x, Tensor[] state, Tensor? bias, SymInt[] shape, int blocksize) -> "
      "Tensor");
  m.def("nf4_linear_backward(Tensor dy, Tensor[] state, SymInt[] shape, int blocksize) -> Tensor");
  // LoRA: `base` is a dense weight, with blocksize 0, or an NF4 state; `route` nothing or [order,
  // starts, scales].
  m.def(
      "lora_shrink(Tensor x, Tensor[] lora_a, float[] scaling, float dropout_p, Tensor? seeds, "
      "Tensor[] route) "
      "-> Tensor");
  m.def(
      "lora_linear(Tensor x, Tensor s, Tensor[] base, Tensor lora_b, Tensor? bias, Tensor? gain, "
      "SymInt[] shape, "
      "int blocksize, Tensor[] route) -> Tensor");
  m.def(
      "lora_expand_backward(Tensor dy, Tensor s, Tensor lora_b, Tensor? gain, Tensor? z, float "
      "scaling, "
      "Tensor[] route, bool[] needs) -> (Tensor u, Tensor d_lora_b, Tensor sum, Tensor "
      "weighted_sum)");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor u, Tensor[] base, Tensor lora_a, Tensor? gain, "
      "Tensor? add, "
      "SymInt[] shape, int blocksize, float dropout_p, Tensor? seed, Tensor[] route) -> Tensor");
  m.def(
      "lora_shrink_backward(Tensor u, Tensor x, int[] ranks, int n, float dropout_p, Tensor? "
      "seeds, Tensor[] route, "
      "ScalarType dtype) -> Tensor[]");
  m.def("lora_row_squares(Tensor[] base, SymInt[] shape, int blocksize) -> Tensor");
  // y = residual + scaling * (act(x down_weight^T + down_bias) up_weight^T + up_bias), in
  // residual's dtype; residual is x by default. needs: of x, down_weight, down_bias, up_weight,
  // up_bias.
  m.def(
      "adapter(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor? residual, "
      "str activation, float scaling) -> Tensor");
  m.def(
      "adapter_backward(Tensor dy, Tensor x, Tensor down_weight, Tensor? down_bias, Tensor "
      "up_weight, "
      "bool residual_is_x, str activation, float scaling, bool[5] needs) -> (Tensor dx, Tensor "
      "d_down_weight, "
      "Tensor d_down_bias, Tensor d_up_weight, Tensor d_up_bias)");
  // LSH attention. buckets: int32 ids [.., n]; order: the positions by (bucket, position), ranks:
  // its inverse, [s, b, h, rounds, n] with s = 2 if k is given. same_bucket if buckets are,
  // duplicates corrected if ranks are.
  m.def("lsh_rotations(Tensor seed, SymInt[] shape) -> Tensor");
  m.def("lsh_hash(Tensor x, Tensor rotations, int[] factors) -> Tensor");
  m.def("lsh_sort(Tensor buckets, int n_buckets) -> (Tensor order, Tensor ranks)");
  m.def(
      "lsh_attention(Tensor q, Tensor? k, Tensor v, Tensor order, Tensor? buckets, Tensor? ranks, "
      "Tensor? mask, "
      "Tensor? seed, float dropout_p, int chunk_length, float scale, str key_norm, str wrap, bool "
      "causal, "
      "bool attend_self, bool mask_queries) -> (Tensor out, Tensor lse)");
  m.def(
      "lsh_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor? k, Tensor v, Tensor "
      "out, Tensor lse, "
      "Tensor order, Tensor? buckets, Tensor? ranks, Tensor? mask, Tensor? seed, float dropout_p, "
      "int chunk_length, "
      "float scale, str key_norm, str wrap, bool causal, bool attend_self, bool mask_queries, "
      "bool[3] needs) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  // Implemented in Python, of torch's own products. Gradients that are not needed are empty.
  m.def(
      "chunked_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, int chunk, "
      "int ignore_index, "
      "bool[3] needs) -> (Tensor sum, Tensor d_hidden, Tensor d_weight, Tensor d_bias)");
  // Reversible streams: stream +- out, rounded to multiples of 2^-bits unless bits is -1. Into
  // flag: 1 if a sum overflowed, 2 if out was not finite.
  m.def(
      "reversible_step(Tensor(a!) stream, Tensor out, bool subtract, int bits, Tensor(b!) flag) -> "
      "()");
}

TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("nf4_quantize", nf4_quantize);
  m.impl("nf4_dequantize", nf4_dequantize);
  m.impl("nf4_linear", nf4_linear);
  m.impl("nf4_linear_backward", nf4_linear_backward);
}

}  // namespace pyfast
