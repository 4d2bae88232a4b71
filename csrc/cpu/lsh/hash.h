// Hashes vectors by random directions, and sorts them by hash.
#pragma once

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

// The last dimension of x[batch, heads, n, dim] has no gaps. The directions are [batch or 1, heads
// or 1, rounds, width, dim], where width is the sum of half of each factor.
struct LSHHash {
  DType dtype;
  const void* x;
  int64_t stride[3];  // of x, in elements
  int64_t batch, heads, n, dim, rounds;
  const float* directions;
  bool each_batch, each_head;  // whether each has its own directions
  const int64_t* factors;
  int64_t factor_count;
};

// Computes the ids to[batch, heads, rounds, n].
void lsh_hash(const LSHHash&, int32_t* to);

// Draws normal numbers by the method of Box and Muller.
void lsh_rotations(uint64_t seed, int64_t count, float* to);

// Sorts each of `rows` rows of n ids, all below n_buckets: computes the positions by (id,
// position), and each position's rank. Returns false if an id is out of range.
bool lsh_sort(const int32_t* buckets, int64_t rows, int64_t n, int64_t n_buckets, int32_t* order,
              int32_t* ranks);

}  // namespace pyfast::cpu
