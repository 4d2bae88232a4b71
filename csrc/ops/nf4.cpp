// The CPU implementations of the NF4 ops: checks, memory, and calls of the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/linear/linear.h"
#include "ops/checks.h"

namespace pyfast {
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
  // bitsandbytes computes the offset with torch's mean; its bits are expected.
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
  const auto view = nf4_view(state, 1, c10::multiply_integers(shape), blocksize);
  const auto kernel_dtype = dtype_of(dtype, "dtype");
  Tensor out = at::empty(shape, at::device(at::kCPU).dtype(dtype));
  cpu::nf4_dequantize(view, kernel_dtype, out.mutable_data_ptr());
  return out;
}

// Returns the weight in float64. No kernel computes in float64; gradcheck needs it.
Tensor double_weight(at::TensorList state, at::IntArrayRef shape, int64_t blocksize) {
  return nf4_dequantize(state, shape, blocksize, at::kFloat).to(at::kDouble);
}

Tensor nf4_linear(const Tensor& x, at::TensorList state, const std::optional<Tensor>& bias,
                  at::IntArrayRef shape, int64_t blocksize) {
  const auto view = nf4_matrix_view(state, shape, blocksize);
  auto [rows, y] = rows_and_result(x, "x", view.cols, view.rows);
  if (bias) check_vector(bias->contiguous(), "bias", x.scalar_type(), view.rows);
  if (x.scalar_type() == at::kDouble)
    return at::linear(x, double_weight(state, shape, blocksize), bias);
  const Tensor bias_values = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  cpu::Linear p{
      {dtype_of(x.scalar_type(), "x")}, rows.const_data_ptr(), y.mutable_data_ptr(), row_count(x)};
  p.bias = bias ? bias_values.const_data_ptr<float>() : nullptr;
  cpu::linear(cpu::FrozenWeight(view), p);
  return y;
}

Tensor nf4_linear_backward(const Tensor& dy, at::TensorList state, at::IntArrayRef shape,
                           int64_t blocksize) {
  const auto view = nf4_matrix_view(state, shape, blocksize);
  auto [rows, dx] = rows_and_result(dy, "dy", view.rows, view.cols);
  if (dy.scalar_type() == at::kDouble)
    return at::matmul(dy, double_weight(state, shape, blocksize));
  cpu::LinearBackward p{{dtype_of(dy.scalar_type(), "dy")},
                        rows.const_data_ptr(),
                        dx.mutable_data_ptr(),
                        row_count(dy)};
  cpu::linear_backward(cpu::FrozenWeight(view), p);
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("nf4_quantize", nf4_quantize);
  m.impl("nf4_dequantize", nf4_dequantize);
  m.impl("nf4_linear", nf4_linear);
  m.impl("nf4_linear_backward", nf4_linear_backward);
}

}  // namespace pyfast
