// The walk along the chunks of a round that LSH attention's forward and backward share. It gathers
// each chunk's queries and keys and scores them.
#pragma once

#include <type_traits>

#include "cpu/common/kernels.h"
#include "cpu/common/scratch.h"
#include "cpu/lsh/attention.h"
#include "cpu/lsh/loops.h"

namespace pyfast::cpu {

// Hands out pieces of a thread's memory. Without memory, it measures how much is needed.
class Slab {
 public:
  explicit Slab(float* memory) : memory_(memory) {}
  float* floats(int64_t count) {
    float* piece = memory_ ? memory_ + size_ : nullptr;
    size_ += round_up(count, 16);
    return piece;
  }
  int32_t* integers(int64_t count) { return reinterpret_cast<int32_t*>(floats(count)); }
  int64_t size() const { return size_; }

 private:
  float* memory_;
  int64_t size_ = 0;
};

// Returns zeros for an object T(p, slab) of each thread.
template <class T>
Scratch slabs_of(const LSHAttention& p, int64_t threads) {
  Slab measure(nullptr);
  T(p, measure);
  Scratch memory(measure.size(), threads);
  std::fill(memory.of(0), memory.of(threads), 0.0f);
  return memory;
}

// Widths in memory are multiples of the loops' lanes. A segment is a run of chunks that one thread
// walks along; its length does not depend on the number of threads.
struct LSHSizes {
  int64_t dim, v_dim, chunk, ld, chunks, last, segment, segments;
  explicit LSHSizes(const LSHAttention& p);
};

constexpr int64_t kTokensInFlight =
    1 << 16;  // heads are done together up to this many tokens, but at least one head
constexpr float kMinNorm = 1e-12f;  // of keys
constexpr float kLog2OfE = 1.44269504f, kLn2 = 0.693147181f;

struct LSHTokens {
  int64_t count;
  int32_t *position, *place;  // place: in the chunk
};

struct LSHQueries : LSHTokens {
  int32_t *limits, *self;
  float *rows, *columns;  // columns: transposed, times scale * log2(e)
};

struct LSHKeys : LSHTokens {
  float *rows, *values, *inverse;  // rows: normalized, with the factor inverse
};

class LSHWalk {
 public:
  LSHWalk(const LSHAttention&, Slab&);

  // start is called before a segment's first chunk, then step with each of its chunks.
  void start(int64_t head, int64_t t, int64_t chunk);
  void step(int64_t chunk);

  // Prefetches the rows of a head that the next chunk gathers, by the order of queries (side 0) or
  // keys (1).
  void prefetch(int side, const HeadRows<const void>& rows, int64_t width) const;
  void prefetch(int side, const float* rows, int64_t row_stride, int64_t width) const;

  // Computes the scores of the queries and keys to `to`, which becomes scores.data.
  void score(float* to);
  // Computes the factors of dropout in the layout of the scores. multiply multiplies such an array
  // by factors.
  void find_dropout_factors(float* to);
  void multiply(const float* factors, float* to) const;

  // Products of arrays in the layout of the scores, with the keys of a part: to = rows[keys]
  // columns[depth][queries]; to[queries] += of^T rows[keys]; to[keys] (+)= of rows[queries].
  void add_columns(int part, const float* rows, int64_t width, const float* columns, int64_t depth,
                   float* to) const;
  void add_by_query(const float* of, int part, const float* rows, int64_t width, float* to) const;
  void add_by_key(const float* of, int part, const float* rows, int64_t width, float* to,
                  bool add) const;

  const LSHAttention& p;
  const LSHLoops& loops;
  const Kernels& kernels;
  const LSHSizes sizes;
  LSHQueries queries;
  LSHKeys keys[2];  // of the chunk before, and of the queries' chunk
  Scores scores;

 private:
  void prefetch(int side, const char* rows, int64_t bytes_between, int64_t bytes_each) const;
  int64_t round_before(int64_t t) const;
  // Returns the part of order, buckets or ranks for a side of the head in a round.
  const int32_t* in_round(const int32_t* all, int side, int64_t round) const;
  void collect_tokens(int side, int64_t round, int64_t chunk, bool masked, LSHTokens&);
  void gather_queries(int64_t chunk);
  void gather_keys(int64_t round, int64_t chunk, LSHKeys&);
  void share_queries(LSHKeys&);
  void gather_values(LSHKeys&);
  void normalize(const float* from, LSHKeys&);
  void find_heights(int part);
  template <class F>
  void each_score(const F& visit) const;
  void hide_other_buckets();
  void correct_duplicates();

  const bool keys_are_queries_;
  int64_t head_ = 0, round_ = 0, chunk_ = 0;
  int32_t *unsorted_, *rank_, *positions_;
  // How many keys each query sees, and how many the queries of each vector look at.
  int32_t *seen_[2], *heights_[2];
  int32_t *ids_, *buckets_, *times_;
  float *logs_, *dropped_;
};

// Returns the row of a position for a head of q's.
template <class T>
T* row_of(const LSHAttention& p, const HeadRows<T>& rows, int64_t head, int64_t position) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  const int64_t kv_head = head % p.heads / (p.heads / rows.heads);
  const int64_t at =
      head / p.heads * rows.batch_stride + kv_head * rows.head_stride + position * rows.row_stride;
  return static_cast<Byte*>(rows.data) + at * item_size(p.dtype);
}

}  // namespace pyfast::cpu
