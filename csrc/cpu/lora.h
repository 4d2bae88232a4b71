// The thin products of LoRA, in fp32: as wide or as high as its rank.
#pragma once

#include "linear.h"

namespace pyfast::cpu {

struct Mask {  // of dropout; threshold 0: none
  uint32_t threshold;
  uint64_t seed;
};

// out[m, ldo], columns 0 .. rank - 1 = mask(x[m, depth]) times the adapter's right[depth, rank]; rows without an
// adapter are zero. `right` is [adapters, depth, rank] or, transposed, [adapters, rank, depth], and holds its factors.
struct Thin : Rows {
  const void* x;
  int64_t m, depth, rank;
  Mask mask;
  const float* right;
  bool transposed;
  const Route& route;
  float* out;
  int64_t ldo;
};
void thin(const Thin&);

// Sums over the rows of each adapter: out[adapters, rank, width] = left[m, rank]^T mask(right[m, width]).
// And over all rows: sum[width] of right, weighted[width] of right * (weight[m, width] - offset[width]).
struct Outer : Rows {
  const float* left;
  int64_t m, rank, ldl;
  const void *right, *weight;  // weight, offset: or null
  const float* offset;
  int64_t width, adapters;
  Mask mask;
  const Route& route;
  float *out, *sum, *weighted;  // each may be null
};
void outer(const Outer&);

// to[rows] = ||W||^2 of each row.
void row_squares(const Base&, float* to);

}  // namespace pyfast::cpu
