// Products with a frozen weight, and a low-rank update in the same sums.
#pragma once

#include <vector>

#include "cpu/linear/weight.h"

namespace pyfast::cpu {

// Which rows have which adapter: position p of the sorted rows is row order[p] (p itself if order
// is null), and positions begin .. end - 1 have one adapter. A position in no segment has none.
struct Segment {
  int64_t begin, end, adapter;
};

struct Route {
  const int32_t* order;
  std::vector<Segment> segments;

  int64_t row(int64_t position) const { return order ? order[position] : position; }
};

struct Rows {  // of the activations, all of one type
  DType dtype;

  const char* row(const void* x, int64_t i, int64_t width) const {
    return static_cast<const char*>(x) + i * width * item_size(dtype);
  }
  char* row(void* x, int64_t i, int64_t width) const {
    return static_cast<char*>(x) + i * width * item_size(dtype);
  }
};

// y[m, rows] = gain (x[m, cols] W^T + S B^T) + bias
struct Linear : Rows {
  const void* x;
  void* y;
  int64_t m;
  const float *bias, *gain;  // [rows], or null
  int64_t rank;              // 0: no low-rank half
  const float *s, *b;        // [m, rank], [adapters, rows, rank]
  Route route;
};
void linear(const Base&, const Linear&);

// dx[m, cols] = (gain dy[m, rows]) W + mask(U A) + add
struct LinearBackward : Rows {
  const void* dy;
  void* dx;
  int64_t m;
  const void* add;    // [m, cols], or null
  const float* gain;  // [rows], or null
  int64_t rank;
  const float *u, *a;  // [m, rank], with the mask's factor 1 / (1 - p); [adapters, rank, cols]
  uint32_t threshold;  // of the mask; 0: none
  uint64_t seed;
  Route route;
};
void linear_backward(const Base&, const LinearBackward&);

constexpr int64_t few = 8;  // rows of x up to which one pass over the weight is all that counts
void linear_few(const Base&, const Linear&);

}  // namespace pyfast::cpu
