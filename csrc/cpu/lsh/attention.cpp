// The forward: rounds one after the other, each merged into a running softmax.
#include "cpu/lsh/attention.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

#include "cpu/lsh/walk.h"

namespace pyfast::cpu {
namespace {

constexpr float kUnseen = -std::numeric_limits<float>::max();  // below all scores, and finite

// The running softmax of the heads in flight: log2 of the largest weight, the sum of weights over
// it, and the sum of weighted values.
struct Running {
  float *max, *sum, *values;
  int64_t row_stride;  // of values
};

class Forward {
 public:
  Forward(const LSHAttention& p, Slab& slab) : walk_(p, slab) {
    const auto& s = walk_.sizes;
    scores_ = slab.floats(2 * s.chunk * s.ld),
    factors_ = slab.floats(p.threshold ? 2 * s.chunk * s.ld : 0);
    max_ = slab.floats(s.chunk), before_ = slab.floats(s.chunk), sum_ = slab.floats(s.chunk);
    values_ = slab.floats(s.chunk * s.v_dim);
  }

  void segment(int64_t head, int64_t t, int64_t index, const Running& running,
               const HeadRows<void>& out, float* lse) {
    const auto& s = walk_.sizes;
    const int64_t first = index * s.segment, last = std::min(s.chunks, first + s.segment);
    walk_.start(head, t, first);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      walk_.step(chunk);
      attend(t, running);
      t == walk_.p.rounds - 1 ? finish(head, out, lse) : keep(running);
    }
  }

 private:
  void attend(int64_t t, const Running& running) {
    const auto& queries = walk_.queries;
    const int64_t v_dim = walk_.p.v_dim, width = walk_.sizes.v_dim;
    for (int64_t i = 0; i < queries.count; ++i)
      before_[i] = max_[i] = t ? running.max[queries.position[i]] : kUnseen;
    walk_.score(scores_);
    if (t) walk_.prefetch(0, running.values, running.row_stride, v_dim);
    walk_.loops.softmax(walk_.scores, max_, sum_);
    if (t == 0) {
      std::fill_n(values_, queries.count * width, 0.0f);
    } else {
      for (int64_t i = 0; i < queries.count; ++i) {
        const int64_t position = queries.position[i];
        const float factor = std::exp2(before_[i] - max_[i]),
                    *from = running.values + position * running.row_stride;
        sum_[i] += factor * running.sum[position];
        for (int64_t j = 0; j < v_dim; ++j) values_[i * width + j] = factor * from[j];
      }
    }
    if (walk_.p.threshold) walk_.find_dropout_factors(factors_), walk_.multiply(factors_, scores_);
    for (int part = 0; part < 2; ++part)
      walk_.add_by_query(scores_, part, walk_.keys[part].values, width, values_);
  }

  void keep(const Running& running) const {
    const int64_t v_dim = walk_.p.v_dim;
    for (int64_t i = 0; i < walk_.queries.count; ++i) {
      const int64_t position = walk_.queries.position[i];
      running.max[position] = max_[i], running.sum[position] = sum_[i];
      std::copy_n(values_ + i * walk_.sizes.v_dim, v_dim,
                  running.values + position * running.row_stride);
    }
  }

  void finish(int64_t head, const HeadRows<void>& out, float* lse) const;

  LSHWalk walk_;
  float *scores_, *factors_, *max_, *before_, *sum_, *values_;
};

// Writes a position's own value, for a query that sees no key.
void write_value_of_self(const LSHAttention& p, int64_t head, int64_t position,
                         const HeadRows<void>& out, float* lse) {
  std::memcpy(row_of(p, out, head, position), row_of(p, p.v, head, position),
              size_t(p.v_dim * item_size(p.dtype)));
  lse[head * p.n + position] = -INFINITY;
}

void Forward::finish(int64_t head, const HeadRows<void>& out, float* lse) const {
  const auto& p = walk_.p;
  for (int64_t i = 0; i < walk_.queries.count; ++i) {
    const int64_t position = walk_.queries.position[i], at = head * p.n + position;
    if (sum_[i] == 0) {
      write_value_of_self(p, head, position, out, lse);
      continue;
    }
    float* row = values_ + i * walk_.sizes.v_dim;
    const float inverse = 1 / sum_[i];
    for (int64_t j = 0; j < p.v_dim; ++j) row[j] *= inverse;
    walk_.kernels.narrow(p.dtype, row, p.v_dim, row_of(p, out, head, position));
    lse[at] = (max_[i] + std::log2(sum_[i])) * kLn2;
  }
}

}  // namespace

void lsh_attention(const LSHAttention& p, const HeadRows<void>& out, float* lse) {
  const int64_t heads = p.batch * p.heads;
  if (heads * p.n == 0) return;
  const LSHSizes sizes(p);
  const int64_t flight = std::min(heads, std::max<int64_t>(1, kTokensInFlight / p.n));
  const bool merges = p.rounds > 1, in_place = p.dtype == DType::f32;
  const Scratch max(merges ? flight * p.n : 0), sum(merges ? flight * p.n : 0);
  const Scratch values(merges && !in_place ? flight * p.n * p.v_dim : 0);
  const Scratch slabs = slabs_of<Forward>(p, at::get_num_threads());
  for (int64_t first = 0; first < heads; first += flight) {
    const int64_t tasks = std::min(flight, heads - first) * sizes.segments;
    for (int64_t t = 0; t < p.rounds; ++t)
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        Slab slab(slabs.of(at::get_thread_num()));
        Forward forward(p, slab);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task / sizes.segments, head = first + i;
          Running running{max.of(0) + i * p.n, sum.of(0) + i * p.n,
                          values.of(0) + i * p.n * p.v_dim, p.v_dim};
          if (in_place)
            running.values = static_cast<float*>(row_of(p, out, head, 0)),
            running.row_stride = out.row_stride;
          forward.segment(head, t, task % sizes.segments, running, out, lse);
        }
      });
  }
  if (!p.mask || !p.mask_queries) return;
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      for (int64_t i = 0; i < p.n; ++i)
        if (!p.mask[head / p.heads * p.n + i]) write_value_of_self(p, head, i, out, lse);
  });
}

}  // namespace pyfast::cpu
