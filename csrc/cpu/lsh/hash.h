// Hashing by random directions, and sorting by hash.
#pragma once

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

// x[batch, heads, n, dim], the last dimension without gaps; directions[batch or 1, heads or 1,
// rounds, width, dim], the width being the sum of half of each factor.
struct LSHHash {
  DType dtype;
  const void* x;
  int64_t stride[3];  // of x, in elements
  int64_t batch, heads, n, dim, rounds;
  const float* directions;
  bool each_batch, each_head;  // whether they have directions of their own
  const int64_t* factors;
  int64_t factor_count;
};

// to[batch, heads, rounds, n]
void lsh_hash(const LSHHash&, int32_t* to);

// Normal numbers, by Box and Muller.
void lsh_rotations(uint64_t seed, int64_t count, float* to);

// For each of `rows` rows of n ids below n_buckets: the positions by (id, position), and each
// position's rank. False if there is an id out of range.
bool lsh_sort(const int32_t* buckets, int64_t rows, int64_t n, int64_t n_buckets, int32_t* order,
              int32_t* ranks);

}  // namespace pyfast::cpu
