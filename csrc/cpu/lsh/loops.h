// The inner loops of LSH attention, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace pyfast::cpu {

// The scores of a chunk's queries, transposed: a key has a row, a query has a column. The keys are
// in two parts, the earlier chunk's and the chunk's own. If attention is causal, both sides are
// sorted by position, so that a part is a staircase: of each `lanes` columns only the first rows
// are looked at, and the others are not written, read or computed.
struct Scores {
  struct Part {
    int64_t first;           // row
    const int32_t* heights;  // of each `lanes` columns; one more at the end repeats the last
  };
  Part parts[2];
  float* data;  // [rows][ld]
  int64_t ld, columns;
  const int32_t* keys;           // positions of the rows
  const int32_t *limits, *self;  // a column sees keys below its limit, except itself
};

struct LSHLoops {
  int64_t lanes;      // all widths are multiples of this
  int64_t tile_rows;  // all heights are multiples of this, or the last

  // c[rows, width] (+)= a[rows, depth] b[depth, width]; for `transposed`, a is [depth, rows].
  void (*multiply)(int64_t rows, int64_t width, int64_t depth, const float* a, int64_t lda,
                   const float* b, int64_t ldb, float* c, int64_t ldc, bool add);
  decltype(multiply) multiply_transposed;

  // to[cols][rows] = times * from[rows][cols].
  void (*transpose)(const float* from, int64_t rows, int64_t cols, int64_t ld, float times,
                    float* to, int64_t ldto);

  // For rows of padded width: to = inverse * from, with inverse = 1 / max(sqrt(|from|^2 + add),
  // least). The backward turns gradients of `to` into those of `from`, in place.
  void (*normalize)(const float* from, int64_t count, int64_t width, float add, float least,
                    float* to, float* inverse);
  void (*normalize_backward)(const float* rows, const float* inverse, int64_t count, int64_t width,
                             float least, float* d);
  // to[places[i]][width] += rows[i].
  void (*add_rows)(const int32_t* places, int64_t count, const float* rows, int64_t ld,
                   int64_t width, float* to, int64_t ldto);

  // count[i] = how many of all are below x[i], for i up to a multiple of lanes.
  void (*count_below)(const int32_t* all, int64_t n, const int32_t* x, int64_t size,
                      int32_t* count);

  // Scores become 2^(score - most), and zero where a query does not see a key. most[columns] grows
  // to their maximum; sum[columns] is their sum.
  void (*softmax)(const Scores&, float* most, float* sum);

  // Scores become p = 2^(score - lse), and dp, in the same layout, becomes scale * p * (dp -
  // delta).
  void (*softmax_backward)(const Scores&, const float* lse, const float* delta, float scale,
                           float* dp);
  // The same without dp.
  void (*probabilities)(const Scores&, const float* lse);
};

const LSHLoops& lsh_loops();  // of isa()

}  // namespace pyfast::cpu
