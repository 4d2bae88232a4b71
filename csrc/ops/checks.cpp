#include "ops/checks.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

namespace pyfast {

std::vector<int64_t> sizes_with_last(const Tensor& x, int64_t last) {
  auto sizes = x.sizes().vec();
  sizes.back() = last;
  return sizes;
}

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

void check_blocksize(int64_t blocksize) {
  const bool is_power_of_two = (blocksize & (blocksize - 1)) == 0;
  TORCH_CHECK_VALUE(blocksize >= 32 && blocksize <= 4096 && is_power_of_two, "blocksize is ",
                    blocksize, "; it must be a power of two, 32 to 4096");
}

void check_sizes(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " has shape ", tensor.sizes(), "; it must be ",
                    sizes);
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, " is on ", tensor.device(), "; it must be on the CPU");
}

void check_tensor(const Tensor& tensor, const char* name, at::ScalarType type,
                  at::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(),
                   "; it must be ", type);
  check_sizes(tensor, name, sizes);
}

void check_vector(const Tensor& tensor, const char* name, at::ScalarType type, int64_t numel) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(),
                   "; it must be ", type);
  TORCH_CHECK_VALUE(tensor.numel() == numel, name, " has ", tensor.numel(),
                    " elements; it must have ", numel);
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.is_cpu(), name,
                    " must be contiguous and on the CPU");
}

cpu::NF4View nf4_view(at::TensorList state, int64_t rows, int64_t cols, int64_t blocksize) {
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

cpu::NF4View nf4_matrix_view(at::TensorList state, at::IntArrayRef shape, int64_t blocksize) {
  TORCH_CHECK_VALUE(shape.size() == 2, "shape is ", shape, "; a linear layer's is [out, in]");
  return nf4_view(state, shape[0], shape[1], blocksize);
}

std::tuple<Tensor, Tensor> rows_and_result(const Tensor& x, const char* name, int64_t in_features,
                                           int64_t out_features) {
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == in_features, name, " has shape ", x.sizes(),
                    "; its last dimension must be ", in_features);
  return {x.contiguous(), at::empty(sizes_with_last(x, out_features), x.options())};
}

}  // namespace pyfast
