// The bottleneck adapter on the CPU. The caller checks all arguments (ops/adapter.cpp).
#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

enum class Activation { relu, gelu, gelu_tanh, silu, tanh };

// A contiguous array; data is null if there is none.
struct Values {
  const void* data;
  DType dtype;
};

// a(x) = scaling * (act(x down^T + down_bias) up^T + up_bias)
struct AdapterView {
  Values down, down_bias;  // [bottleneck, in], [bottleneck]
  Values up, up_bias;      // [out, bottleneck], [out]
  int64_t in, bottleneck, out;
  Activation activation;
  float scaling;
};

// Computes y[m, out] = residual + a(x), in residual's dtype.
void adapter(Values x, int64_t m, const AdapterView&, Values residual, void* y);

// Where the gradients go; null if one is not needed.
struct AdapterGradients {
  void* x;          // in x's dtype
  void *down, *up;  // in those weights' dtypes
  float *down_bias, *up_bias;
};

// Computes the gradients from dy[m, out]. With `residual_is_x`, dy is added to x's gradient.
void adapter_backward(Values dy, Values x, int64_t m, const AdapterView&, bool residual_is_x,
                      const AdapterGradients&);

}  // namespace pyfast::cpu
