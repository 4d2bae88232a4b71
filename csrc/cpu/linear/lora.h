// The products of LoRA that are as narrow or as low as its rank, in fp32.
#pragma once

#include "cpu/linear/linear.h"

namespace pyfast::cpu {

// The mask of dropout; there is none if threshold is 0.
struct Mask {
  uint32_t threshold;
  uint64_t seed;
};

// Columns 0 .. rank - 1 of out[m, ldo] = mask(x[m, depth]) (scale gain[depth] right[depth, rank]),
// with the right factor and scale of the row's adapter. Rows without an adapter are zero. `right`
// is [adapters, depth, rank] or, transposed, [adapters, rank, depth].
struct RankProjection : ActivationRows {
  const void* x;
  int64_t m, depth, rank;
  Mask mask;
  const void* right;
  DType right_dtype;
  bool transposed;
  const float *gain, *scales;  // gain may be null; scales: one for each adapter
  const Route& route;
  float* out;
  int64_t ldo;
};
void project_to_rank(const RankProjection&);

// Sums over the rows of each adapter: out[adapters, rank, width] = left[m, rank]^T mask(right[m,
// width]). Sums over all rows: sum[width] of right, and weighted[width] of right * weight[m,
// width].
struct OuterProductSums : ActivationRows {
  const float* left;
  int64_t m, rank, ldl;
  const void *right, *weight;  // weight may be null
  int64_t width, adapters;
  Mask mask;
  const Route& route;
  float *out, *sum, *weighted;  // each may be null
};
void sum_outer_products(const OuterProductSums&);

// Computes to[rows] = ||W||^2 of each row.
void row_squares(const FrozenWeight&, float* to);

}  // namespace pyfast::cpu
