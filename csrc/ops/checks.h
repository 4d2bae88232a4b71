// What several ops check and read. Memory safety rests on these checks alone; friendlier checks of
// user input are in Python (pyfast/_support/checks.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include <tuple>
#include <vector>

#include "cpu/common/dtype.h"
#include "cpu/nf4/nf4.h"

namespace pyfast {

using at::Tensor;

constexpr int64_t kNestedBlocksize = 256;  // scales that share one nested_absmax

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns how many rows x has: the product of all sizes but the last.
inline int64_t row_count(const Tensor& x) {
  return c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
}

// Returns the sizes of x with another last one.
std::vector<int64_t> sizes_with_last(const Tensor& x, int64_t last);

// Raises TypeError unless `type` is one that the kernels know.
cpu::DType dtype_of(at::ScalarType type, const char* name);

// Returns dropout_p in units of 2^-16, or raises ValueError.
uint32_t dropout_threshold(double p);

// Raises ValueError unless `blocksize` is a power of two from 32 to 4096.
void check_blocksize(int64_t blocksize);

// Raises unless the tensor has these sizes and is on the CPU.
void check_sizes(const Tensor&, const char* name, at::IntArrayRef sizes);

// Raises unless the tensor has this dtype, these sizes, and is on the CPU.
void check_tensor(const Tensor&, const char* name, at::ScalarType, at::IntArrayRef sizes);

// Raises unless the tensor has this dtype and number of elements, is contiguous and on the CPU.
void check_vector(const Tensor&, const char* name, at::ScalarType, int64_t numel);

// Returns the state of a 4-bit weight as the kernels take it. The state is [packed, absmax, code]
// or [.., nested_absmax, nested_code, offset].
cpu::NF4View nf4_view(at::TensorList state, int64_t rows, int64_t cols, int64_t blocksize);
cpu::NF4View nf4_matrix_view(at::TensorList state, at::IntArrayRef shape, int64_t blocksize);

// Returns x[.., in_features], contiguous, and an empty tensor for a result [.., out_features].
std::tuple<Tensor, Tensor> rows_and_result(const Tensor& x, const char* name, int64_t in_features,
                                           int64_t out_features);

}  // namespace pyfast
