// Products of dense matrices, with factors in fp32 or, where multiplies_bf16 says so, in bf16.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "cpu/common/kernels.h"

namespace pyfast::cpu {

// Returns whether torch's brgemm multiplies this type here, with AVX512-BF16 or AMX.
bool multiplies_bf16(DType);

// Computes c[height, width] (+)= a[height, depth] b[depth, width]. In bf16, b holds pairs of steps
// of the sum: [depth / 2][width][2].
inline void multiply(const Kernels&, int64_t height, int64_t width, int64_t depth,
                     const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, float* c,
                     int64_t ldc, bool add) {
  at::native::cpublas::brgemm(height, width, depth, lda, ldb, ldc, add,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

inline void multiply(const Kernels& k, int64_t height, int64_t width, int64_t depth, const float* a,
                     int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < width; j += k.tile_width)
    for (int64_t i = 0; i < height; i += k.tile_height)
      k.tile(std::min(k.tile_height, height - i), depth, a + i * lda, lda, b + j, ldb,
             c + i * ldc + j, ldc, add);
}

}  // namespace pyfast::cpu
