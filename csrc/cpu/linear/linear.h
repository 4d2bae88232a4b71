// Products with a frozen weight, with a low-rank update in the same sums.
#pragma once

#include <vector>

#include "cpu/linear/weight.h"

namespace pyfast::cpu {

// Says which rows have which adapter. Position p of the sorted rows is row order[p], or p itself if
// order is null. Positions begin .. end - 1 of a segment have one adapter; a position in no segment
// has none.
struct Segment {
  int64_t begin, end, adapter;
};

struct Route {
  const int32_t* order;
  std::vector<Segment> segments;

  int64_t row(int64_t position) const { return order ? order[position] : position; }
};

// Addresses of rows of the activations, which all have one type.
struct ActivationRows {
  DType dtype;

  const char* row(const void* x, int64_t i, int64_t width) const {
    return static_cast<const char*>(x) + i * width * item_size(dtype);
  }
  char* row(void* x, int64_t i, int64_t width) const {
    return static_cast<char*>(x) + i * width * item_size(dtype);
  }
};

// y[m, rows] = gain (x[m, cols] W^T + S B^T) + bias
struct Linear : ActivationRows {
  const void* x;
  void* y;
  int64_t m;
  const float *bias, *gain;  // [rows], or null
  int64_t rank;              // 0: no low-rank update
  const float *s, *b;        // [m, rank], [adapters, rows, rank]
  Route route;
};
void linear(const FrozenWeight&, const Linear&);

// dx[m, cols] = (gain dy[m, rows]) W + mask(U A) + add
struct LinearBackward : ActivationRows {
  const void* dy;
  void* dx;
  int64_t m;
  const void* add;    // [m, cols], or null
  const float* gain;  // [rows], or null
  int64_t rank;
  const float *u, *a;  // [m, rank], times 1 / (1 - p) of the mask; [adapters, rank, cols]
  uint32_t threshold;  // of the mask; 0: none
  uint64_t seed;
  Route route;
};
void linear_backward(const FrozenWeight&, const LinearBackward&);

// Up to this many rows of x, the time is that of one pass over the weight.
constexpr int64_t kFewRows = 8;
void linear_few_rows(const FrozenWeight&, const Linear&);

}  // namespace pyfast::cpu
