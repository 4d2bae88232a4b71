// The backward: rounds one after the other, with the scores of each computed once more. In a round,
// a position gets gradients from its own chunk and from the next. Where the next chunk is another
// thread's, they wait at the border until all threads are done.
#include <ATen/Parallel.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/lsh/attention.h"
#include "cpu/lsh/walk.h"

namespace pyfast::cpu {
namespace {

// Rows of float32 to add to; null if not needed.
struct Sum {
  float* data;
  int64_t row_stride;
  explicit operator bool() const { return data; }
};

// Sums in float32 of a gradient of the heads in flight, [heads, n, width]. A group of queries'
// heads shares one. A float32 gradient is its own sum.
class Sums {
 public:
  Sums(const LSHAttention& p, const HeadRows<void>& gradient, int64_t width, int64_t in_flight)
      : p_(p),
        gradient_(gradient),
        group_(gradient.data ? p.heads / gradient.heads : 1),
        width_(width),
        in_place_(p.dtype == DType::f32),
        memory_(gradient.data && !in_place_ ? in_flight * p.n * width : 0) {}

  // Puts `count` of the gradient's heads in flight, from that of `head` on, `stride` apart.
  void begin(int64_t head, int64_t count, int64_t stride) {
    first_ = head / group_, count_ = count, stride_ = stride;
    each_row([&](int64_t i, int64_t position) {
      const Sum sum = at(i);
      std::fill_n(sum.data + position * sum.row_stride, width_, 0.0f);
    });
  }
  void finish() const {
    if (in_place_) return;
    each_row([&](int64_t i, int64_t position) {
      kernels().narrow(p_.dtype, at(i).data + position * width_, width_,
                       row_of(p_, gradient_, head(i), position));
    });
  }
  Sum of(int64_t head) const {
    return gradient_.data ? at((head / group_ - first_) / stride_) : Sum{};
  }

 private:
  int64_t head(int64_t i) const { return (first_ + i * stride_) * group_; }
  Sum at(int64_t i) const {
    if (!in_place_) return {memory_.of(0) + i * p_.n * width_, width_};
    return {static_cast<float*>(row_of(p_, gradient_, head(i), 0)), gradient_.row_stride};
  }
  template <class F>
  void each_row(const F& visit) const {
    if (!gradient_.data) return;
    at::parallel_for(0, count_ * p_.n, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) visit(row / p_.n, row % p_.n);
    });
  }

  const LSHAttention& p_;
  HeadRows<void> gradient_;
  int64_t group_, width_, first_ = 0, count_ = 0, stride_ = 1;
  bool in_place_;
  Scratch memory_;
};

// The sums of one head. keys is queries where the queries are the keys.
struct Head {
  int64_t index;
  Sum queries, keys, values;
  float* delta;
};

void add_to(const Sum& sum, const int32_t* positions, int64_t count, const float* rows, int64_t ld,
            int64_t width) {
  if (sum) lsh_loops().add_rows(positions, count, rows, ld, width, sum.data, sum.row_stride);
}

void add_keys(const LSHAttention& p, const LSHSizes& s, const Head& head, const int32_t* positions,
              int64_t count, const float* rows, const float* values) {
  add_to(head.keys, positions, count, rows, s.dim, p.dim);
  add_to(head.values, positions, count, values, s.v_dim, p.v_dim);
}

// What a segment's first chunk adds to the keys of the chunk before.
struct Border {
  int32_t *count, *position;
  float *rows, *values;
  Border(const LSHSizes& s, Slab slab)
      : count(slab.integers(1)),
        position(slab.integers(s.chunk)),
        rows(slab.floats(s.chunk * s.dim)),
        values(slab.floats(s.chunk * s.v_dim)) {}
  static int64_t size(const LSHSizes& s) { return 16 + s.chunk * (1 + s.dim + s.v_dim); }
};

class Backward {
 public:
  Backward(const LSHAttention& p, Slab& slab) : walk_(p, slab) {
    const auto& s = walk_.sizes;
    const int64_t size = (2 * s.chunk) * s.ld;
    scores_ = slab.floats(size), d_scores_ = slab.floats(size),
    factors_ = slab.floats(p.threshold ? size : 0);
    lse_ = slab.floats(s.chunk), delta_ = slab.floats(s.chunk);
    dout_rows_ = slab.floats(s.chunk * s.v_dim), dout_columns_ = slab.floats(p.v_dim * s.ld);
    d_queries_ = slab.floats(s.chunk * s.dim);
    for (int part = 0; part < 2; ++part)
      d_rows_[part] = slab.floats(s.chunk * s.dim),
      d_values_[part] = slab.floats(s.chunk * s.v_dim);
  }

  void segment(const Head& head, int64_t t, int64_t index, const HeadRows<const void>& dout,
               const float* lse, const Border& border) {
    const auto& s = walk_.sizes;
    const int64_t first = index * s.segment, last = std::min(s.chunks, first + s.segment);
    walk_.start(head.index, t, first);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      walk_.step(chunk);
      std::swap(d_rows_[0], d_rows_[1]), std::swap(d_values_[0], d_values_[1]);
      gather(head, dout, lse);
      compute_weights(head);
      prefetch(head, dout);
      multiply(head, chunk > first);
      chunk > first ? release(head, 0) : release(border);
    }
    release(head, 1);
  }

 private:
  void prefetch(const Head& head, const HeadRows<const void>& dout) const {
    const auto& p = walk_.p;
    const auto ask = [&](int side, const Sum& sum, int64_t width) {
      if (sum) walk_.prefetch(side, sum.data, sum.row_stride, width);
    };
    walk_.prefetch(0, dout, p.v_dim);
    ask(0, head.queries, p.dim);
    if (p.k.data) ask(1, head.keys, p.dim);
    ask(1, head.values, p.v_dim);
  }

  void gather(const Head& head, const HeadRows<const void>& dout, const float* lse) {
    const auto& p = walk_.p;
    const auto& s = walk_.sizes;
    const auto& queries = walk_.queries;
    for (int64_t i = 0; i < queries.count; ++i) {
      const int64_t position = queries.position[i];
      const float head_lse = lse[head.index * p.n + position];
      lse_[i] = head_lse == -INFINITY ? 0 : head_lse * kLog2OfE;
      delta_[i] = head_lse == -INFINITY ? 0 : head.delta[position];
      walk_.kernels.widen(p.dtype, row_of(p, dout, head.index, position), p.v_dim,
                          dout_rows_ + i * s.v_dim);
    }
    if (head.queries || head.keys)
      walk_.loops.transpose(dout_rows_, queries.count, p.v_dim, s.v_dim, 1, dout_columns_, s.ld);
  }

  // Turns scores_ into the weights after dropout, and d_scores_ into the gradients of the scores.
  void compute_weights(const Head& head) {
    const auto& p = walk_.p;
    walk_.score(scores_);
    if (p.threshold) walk_.find_dropout_factors(factors_);
    if (head.queries || head.keys) {
      for (int part = 0; part < 2; ++part)
        walk_.add_columns(part, walk_.keys[part].values, walk_.sizes.v_dim, dout_columns_, p.v_dim,
                          d_scores_);
      if (p.threshold) walk_.multiply(factors_, d_scores_);
      walk_.loops.softmax_backward(walk_.scores, lse_, delta_, p.scale, d_scores_);
    } else {
      walk_.loops.probabilities(walk_.scores, lse_);
    }
    if (p.threshold) walk_.multiply(factors_, scores_);
  }

  void multiply(const Head& head, bool has_earlier) {
    const auto& s = walk_.sizes;
    const auto& queries = walk_.queries;
    std::fill_n(d_queries_, queries.count * s.dim, 0.0f);
    for (int part = 0; part < 2; ++part) {
      const bool adds = part == 0 && has_earlier;
      if (head.values) walk_.add_by_key(scores_, part, dout_rows_, s.v_dim, d_values_[part], adds);
      if (head.keys) walk_.add_by_key(d_scores_, part, queries.rows, s.dim, d_rows_[part], adds);
      if (head.queries)
        walk_.add_by_query(d_scores_, part, walk_.keys[part].rows, s.dim, d_queries_);
    }
    add_to(head.queries, queries.position, queries.count, d_queries_, s.dim, walk_.p.dim);
  }

  // Turns the gradients of normalized keys into those of keys.
  void backward_norm(int part) {
    const LSHKeys& keys = walk_.keys[part];
    if (walk_.p.key_norm != KeyNorm::none)
      walk_.loops.normalize_backward(keys.rows, keys.inverse, keys.count, walk_.sizes.dim, kMinNorm,
                                     d_rows_[part]);
  }

  void release(const Head& head, int part) {
    const auto& s = walk_.sizes;
    const LSHKeys& keys = walk_.keys[part];
    if (head.keys) backward_norm(part);
    add_keys(walk_.p, s, head, keys.position, keys.count, d_rows_[part], d_values_[part]);
  }

  void release(const Border& border) {
    const auto& s = walk_.sizes;
    const LSHKeys& keys = walk_.keys[0];
    backward_norm(0);
    *border.count = int32_t(keys.count);
    std::copy_n(keys.position, keys.count, border.position);
    std::copy_n(d_rows_[0], keys.count * s.dim, border.rows);
    std::copy_n(d_values_[0], keys.count * s.v_dim, border.values);
  }

  LSHWalk walk_;
  float *scores_, *d_scores_, *factors_, *lse_, *delta_, *dout_rows_, *dout_columns_, *d_queries_;
  float *d_rows_[2], *d_values_[2];
};

// Computes delta = dout . out - dlse. A query that sees no key has its own value as output, which
// gets its gradient here.
void begin_heads(const LSHAttention& p, const std::vector<Head>& heads,
                 const HeadRows<const void>& dout, const float* dlse,
                 const HeadRows<const void>& out, const float* lse) {
  at::parallel_for(0, int64_t(heads.size()) * p.n, 1024, [&](int64_t begin, int64_t end) {
    float dout_row[256], value[256];
    for (int64_t i = begin; i < end; ++i) {
      const Head& head = heads[size_t(i / p.n)];
      const int64_t position = i % p.n, at = head.index * p.n + position;
      kernels().widen(p.dtype, row_of(p, dout, head.index, position), p.v_dim, dout_row);
      if (lse[at] == -INFINITY) {
        const int32_t place = int32_t(position);
        add_to(head.values, &place, 1, dout_row, p.v_dim, p.v_dim);
        continue;
      }
      kernels().widen(p.dtype, row_of(p, out, head.index, position), p.v_dim, value);
      head.delta[position] =
          kernels().dot(DType::f32, dout_row, value, p.v_dim) - (dlse ? dlse[at] : 0);
    }
  });
}

void add_border(const LSHAttention& p, const LSHSizes& s, const Head& head, const Border& border) {
  add_keys(p, s, head, border.position, *border.count, border.rows, border.values);
}

void backward_round(const LSHAttention& p, const std::vector<Head>& heads, int64_t t,
                    const HeadRows<const void>& dout, const float* lse, const Scratch& slabs,
                    const Scratch& borders) {
  const LSHSizes s(p);
  const int64_t tasks = int64_t(heads.size()) * s.segments;
  const auto border_of = [&](int64_t task) { return Border(s, Slab(borders.of(task))); };
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Slab slab(slabs.of(at::get_thread_num()));
    Backward backward(p, slab);
    for (int64_t task = begin; task < end; ++task)
      backward.segment(heads[size_t(task / s.segments)], t, task % s.segments, dout, lse,
                       border_of(task));
  });
  at::parallel_for(0, tasks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      if (task % s.segments) add_border(p, s, heads[size_t(task / s.segments)], border_of(task));
  });
  // These come last: a round's first chunk may look back on another round's chunk, whose positions
  // are anywhere in this round.
  at::parallel_for(0, int64_t(heads.size()), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      add_border(p, s, heads[size_t(i)], border_of(i * s.segments));
  });
}

}  // namespace

void lsh_attention_backward(const LSHAttention& p, const HeadRows<const void>& dout,
                            const float* dlse, const HeadRows<const void>& out, const float* lse,
                            const LSHGradients& to) {
  const int64_t heads = p.batch * p.heads;
  if (heads * p.n == 0 || !(to.q.data || to.k.data || to.v.data)) return;
  const LSHSizes s(p);
  // Heads that share keys or values are neighbors, a family; one head of each family is in flight
  // at a time.
  const int64_t k_group = p.k.data ? p.heads / p.k.heads : 1, v_group = p.heads / p.v.heads;
  const int64_t family = std::lcm(k_group, v_group), families = heads / family;
  const int64_t flight = std::min(families, std::max<int64_t>(1, kTokensInFlight / p.n));
  Sums q(p, to.q, p.dim, flight);
  Sums k(p, to.k, p.dim, flight * (family / k_group));
  Sums v(p, to.v, p.v_dim, flight * (family / v_group));
  const Scratch delta(flight * p.n), borders(Border::size(s), flight * s.segments);
  const Scratch slabs = slabs_of<Backward>(p, at::get_num_threads());
  for (int64_t first = 0; first < heads; first += flight * family) {
    const int64_t here = std::min(flight, (heads - first) / family);
    k.begin(first, here * (family / k_group), 1), v.begin(first, here * (family / v_group), 1);
    for (int64_t member = 0; member < family; ++member) {
      q.begin(first + member, here, family);
      std::vector<Head> in_flight;
      for (int64_t i = 0; i < here; ++i) {
        const int64_t head = first + member + i * family;
        in_flight.push_back(
            {head, q.of(head), (p.k.data ? k : q).of(head), v.of(head), delta.of(0) + i * p.n});
      }
      begin_heads(p, in_flight, dout, dlse, out, lse);
      for (int64_t t = 0; t < p.rounds; ++t)
        backward_round(p, in_flight, t, dout, lse, slabs, borders);
      q.finish();
    }
    k.finish(), v.finish();
  }
}

}  // namespace pyfast::cpu
