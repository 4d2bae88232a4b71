// The forward: rounds one after the other, each merged into a softmax that runs along with them.
#include "cpu/lsh/attention.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

#include "cpu/lsh/walk.h"

namespace pyfast::cpu {
namespace {

constexpr float unseen = -std::numeric_limits<float>::max();  // below all scores, and finite

struct Running {  // of the heads in flight: log2 of the largest weight, the sum of weights over it,
                  // of weighted values
  float *most, *sum, *values;
  int64_t between;  // values
};

class Forward {
 public:
  Forward(const LSHAttention& p, Slab& slab) : walk_(p, slab) {
    const auto& s = walk_.sizes;
    scores_ = slab.floats(2 * s.chunk * s.ld),
    kept_ = slab.floats(p.threshold ? 2 * s.chunk * s.ld : 0);
    most_ = slab.floats(s.chunk), before_ = slab.floats(s.chunk), sum_ = slab.floats(s.chunk);
    values_ = slab.floats(s.chunk * s.v_dim);
  }

  void segment(int64_t head, int64_t t, int64_t index, const Running& running,
               const Rows<void>& out, float* lse) {
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
    const int64_t e = walk_.p.v_dim, width = walk_.sizes.v_dim;
    for (int64_t i = 0; i < queries.count; ++i)
      before_[i] = most_[i] = t ? running.most[queries.position[i]] : unseen;
    walk_.score(scores_);
    if (t) walk_.prefetch(0, running.values, running.between, e);
    walk_.loops.softmax(walk_.scores, most_, sum_);
    if (t == 0) {
      std::fill_n(values_, queries.count * width, 0.0f);
    } else {
      for (int64_t i = 0; i < queries.count; ++i) {
        const int64_t position = queries.position[i];
        const float less = std::exp2(before_[i] - most_[i]),
                    *from = running.values + position * running.between;
        sum_[i] += less * running.sum[position];
        for (int64_t j = 0; j < e; ++j) values_[i * width + j] = less * from[j];
      }
    }
    if (walk_.p.threshold) walk_.find_kept(kept_), walk_.multiply(kept_, scores_);
    for (int part = 0; part < 2; ++part)
      walk_.add_by_query(scores_, part, walk_.keys[part].values, width, values_);
  }

  void keep(const Running& running) const {
    const int64_t e = walk_.p.v_dim;
    for (int64_t i = 0; i < walk_.queries.count; ++i) {
      const int64_t position = walk_.queries.position[i];
      running.most[position] = most_[i], running.sum[position] = sum_[i];
      std::copy_n(values_ + i * walk_.sizes.v_dim, e, running.values + position * running.between);
    }
  }

  void finish(int64_t head, const Rows<void>& out, float* lse) const;

  LSHWalk walk_;
  float *scores_, *kept_, *most_, *before_, *sum_, *values_;
};

void own_value(const LSHAttention& p, int64_t head, int64_t position, const Rows<void>& out,
               float* lse) {
  std::memcpy(row_of(p, out, head, position), row_of(p, p.v, head, position),
              size_t(p.v_dim * item_size(p.dtype)));
  lse[head * p.n + position] = -INFINITY;
}

void Forward::finish(int64_t head, const Rows<void>& out, float* lse) const {
  const auto& p = walk_.p;
  for (int64_t i = 0; i < walk_.queries.count; ++i) {
    const int64_t position = walk_.queries.position[i], at = head * p.n + position;
    if (sum_[i] == 0) {
      own_value(p, head, position, out, lse);
      continue;
    }
    float* row = values_ + i * walk_.sizes.v_dim;
    const float inverse = 1 / sum_[i];
    for (int64_t j = 0; j < p.v_dim; ++j) row[j] *= inverse;
    walk_.kernels.narrow(p.dtype, row, p.v_dim, row_of(p, out, head, position));
    lse[at] = (most_[i] + std::log2(sum_[i])) * ln_2;
  }
}

}  // namespace

void lsh_attention(const LSHAttention& p, const Rows<void>& out, float* lse) {
  const int64_t heads = p.batch * p.heads;
  if (heads * p.n == 0) return;
  const LSHSizes sizes(p);
  const int64_t flight = std::min(heads, std::max<int64_t>(1, tokens_in_flight / p.n));
  const bool merges = p.rounds > 1, in_place = p.dtype == DType::f32;
  const Scratch most(merges ? flight * p.n : 0), sum(merges ? flight * p.n : 0);
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
          Running running{most.of(0) + i * p.n, sum.of(0) + i * p.n,
                          values.of(0) + i * p.n * p.v_dim, p.v_dim};
          if (in_place)
            running.values = static_cast<float*>(row_of(p, out, head, 0)),
            running.between = out.between;
          forward.segment(head, t, task % sizes.segments, running, out, lse);
        }
      });
  }
  if (!p.mask || !p.mask_queries) return;
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      for (int64_t i = 0; i < p.n; ++i)
        if (!p.mask[head / p.heads * p.n + i]) own_value(p, head, i, out, lse);
  });
}

}  // namespace pyfast::cpu
