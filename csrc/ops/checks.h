// What the op files share: what memory safety rests on is checked here.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include "cpu/nf4/nf4.h"

namespace pyfast {

using at::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

cpu::DType dtype_of(at::ScalarType type, const char* name);
uint32_t dropout_threshold(double p);  // in units of 2^-16
void check_vector(const Tensor&, const char* name, at::ScalarType, int64_t numel);

// The state of a weight, [packed, absmax, code] or [.., nested_absmax, nested_code, offset], as the
// kernels take it.
cpu::NF4View view_of(at::TensorList state, int64_t rows, int64_t cols, int64_t blocksize);
cpu::NF4View matrix_of(at::TensorList state, at::IntArrayRef shape, int64_t blocksize);

// x[.., from] as rows, and room for the result [.., to].
std::tuple<Tensor, Tensor> rows_and_result(const Tensor& x, const char* name, int64_t from,
                                           int64_t to);
inline int64_t row_count(const Tensor& x) {
  return c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
}

}  // namespace pyfast
