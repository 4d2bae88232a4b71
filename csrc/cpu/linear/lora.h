// The thin products of LoRA, in fp32: as wide or as high as its rank.
#pragma once

#include "cpu/linear/linear.h"

namespace pyfast::cpu {

struct Mask {  // of dropout; threshold 0: none
  uint32_t threshold;
  uint64_t seed;
};

// out[m, ldo], columns 0 .. rank - 1 = mask(x[m, depth]) (scale gain[depth] right[depth, rank]) of
// the row's adapter; rows without one are zero. `right` is [adapters, depth, rank] or, transposed,
// [adapters, rank, depth].
struct Thin : Rows {
  const void* x;
  int64_t m, depth, rank;
  Mask mask;
  const void* right;
  DType right_dtype;
  bool transposed;
  const float *gain, *scales;  // gain: or null; scales: one for each adapter
  const Route& route;
  float* out;
  int64_t ldo;
};
void thin(const Thin&);

// Sums over the rows of each adapter: out[adapters, rank, width] = left[m, rank]^T mask(right[m,
// width]). And over all rows: sum[width] of right, weighted[width] of right * weight[m, width].
struct Outer : Rows {
  const float* left;
  int64_t m, rank, ldl;
  const void *right, *weight;  // weight: or null
  int64_t width, adapters;
  Mask mask;
  const Route& route;
  float *out, *sum, *weighted;  // each may be null
};
void outer(const Outer&);

// to[rows] = ||W||^2 of each row.
void row_squares(const Base&, float* to);

}  // namespace pyfast::cpu
