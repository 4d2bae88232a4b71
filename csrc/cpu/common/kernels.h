// The inner loops that every op uses, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

struct Kernels {
  // Casts `count` elements to float, or rounds floats to nearest.
  void (*widen)(DType, const void* from, int64_t count, float* to);
  void (*narrow)(DType, const float* from, int64_t count, void* to);

  // Returns sum_i a[i] b[i]; a is of any type.
  float (*dot)(DType, const void* a, const float* b, int64_t count);

  // c[height, tile_width] (+)= a[height, depth] @ b[depth, tile_width], height <= tile_height.
  void (*tile)(int64_t height, int64_t depth, const float* a, int64_t lda, const float* b,
               int64_t ldb, float* c, int64_t ldc, bool add);
  int64_t tile_height, tile_width;
  decltype(tile) narrow_tile;  // half as wide

  // to[2 count] = a[0], b[0], a[1], b[1], ...
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* to);

  // Applies dropout to columns col .. col + count - 1 of a row; col is a multiple of 8. See
  // philox.h.
  void (*drop)(uint64_t seed, int64_t row, int64_t col, int64_t count, uint32_t threshold,
               float* x);
};

const Kernels& kernels();  // those of isa()

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace pyfast::cpu
