#include "cpu/lsh/walk.h"

#include <climits>
#include <cmath>

namespace pyfast::cpu {
namespace {

constexpr int64_t kSegmentTokens = 512, kMinChunks = 4;

}  // namespace

LSHSizes::LSHSizes(const LSHAttention& p) {
  const int64_t lanes = lsh_loops().lanes;
  dim = round_up(p.dim, lanes), v_dim = round_up(p.v_dim, lanes), chunk = round_up(p.chunk, lanes);
  ld = chunk + lanes;  // because rows a power of two apart would share cache sets
  chunks = (p.n + p.chunk - 1) / p.chunk, last = chunks - 1;
  segment = std::max(kMinChunks, kSegmentTokens / p.chunk);
  segments = (chunks + segment - 1) / segment;
}

LSHWalk::LSHWalk(const LSHAttention& p, Slab& slab)
    : p(p),
      loops(lsh_loops()),
      kernels(cpu::kernels()),
      sizes(p),
      queries{},
      keys{},
      scores{},
      keys_are_queries_(!p.k.data && (!p.mask || p.mask_queries)) {
  const int64_t c = sizes.chunk, steps = c / loops.lanes + 1;
  queries.position = slab.integers(c), queries.place = slab.integers(c);
  queries.limits = slab.integers(c), queries.self = slab.integers(c);
  queries.rows = slab.floats(c * sizes.dim), queries.columns = slab.floats(p.dim * sizes.ld);
  for (int part = 0; part < 2; ++part) {
    LSHKeys& k = keys[part];
    k.position = slab.integers(c), k.place = slab.integers(c);
    k.rows = slab.floats(c * sizes.dim), k.values = slab.floats(c * sizes.v_dim),
    k.inverse = slab.floats(c);
    seen_[part] = slab.integers(c), heights_[part] = slab.integers(steps);
    scores.parts[part].heights = heights_[part];
  }
  unsorted_ = slab.integers(c), rank_ = slab.integers(c), positions_ = slab.integers(2 * c);
  ids_ = slab.integers(p.ranks ? p.rounds * c : 0),
  buckets_ = slab.integers(p.buckets ? p.rounds * c : 0);
  times_ = slab.integers(p.ranks ? c : 0), logs_ = slab.floats(p.ranks ? 3 * p.rounds + 1 : 0);
  dropped_ = slab.floats(p.threshold ? 2 * p.chunk : 0);
  scores.ld = sizes.ld, scores.columns = c;
  scores.keys = positions_, scores.limits = queries.limits, scores.self = queries.self;
}

void LSHWalk::start(int64_t head, int64_t t, int64_t chunk) {
  head_ = head, round_ = t;
  if (p.ranks)
    for (int64_t i = 1; i <= 3 * p.rounds; ++i) logs_[i] = std::log2(float(i));
  keys[1].count = 0;
  if (chunk > 0) return gather_keys(t, chunk - 1, keys[1]);
  const int64_t before = round_before(t);
  const bool none = p.wrap == Wrap::none || (before == t && sizes.last == 0);
  if (!none && !(p.buckets && before != t)) gather_keys(before, sizes.last, keys[1]);
}

int64_t LSHWalk::round_before(int64_t t) const {
  return p.wrap == Wrap::rounds ? (t + p.rounds - 1) % p.rounds : t;
}

void LSHWalk::step(int64_t chunk) {
  chunk_ = chunk;
  std::swap(keys[0], keys[1]);
  gather_queries(chunk);
  keys_are_queries_ ? share_queries(keys[1]) : gather_keys(round_, chunk, keys[1]);
  std::copy_n(keys[0].position, keys[0].count, positions_);
  std::copy_n(keys[1].position, keys[1].count, positions_ + keys[0].count);
  scores.parts[1].first = keys[0].count;
  for (int part = 0; part < 2; ++part) find_heights(part);
  prefetch(0, p.q, p.dim);
  if (p.k.data) prefetch(1, p.k, p.dim);
  prefetch(1, p.v, p.v_dim);
}

void LSHWalk::prefetch(int side, const HeadRows<const void>& rows, int64_t width) const {
  const int64_t item = item_size(p.dtype);
  prefetch(side, static_cast<const char*>(row_of(p, rows, head_, 0)), rows.row_stride * item,
           width * item);
}

void LSHWalk::prefetch(int side, const float* rows, int64_t row_stride, int64_t width) const {
  prefetch(side, reinterpret_cast<const char*>(rows), row_stride * 4, width * 4);
}

void LSHWalk::prefetch(int side, const char* rows, int64_t bytes_between,
                       int64_t bytes_each) const {
  const int64_t first = (chunk_ + 1) * p.chunk, last = std::min(p.n, first + p.chunk);
  const int32_t* order = in_round(p.order, side, round_);
  for (int64_t i = first; i < last; ++i) {
    const char* row = rows + order[i] * bytes_between;
    for (int64_t at = 0; at < bytes_each; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

const int32_t* LSHWalk::in_round(const int32_t* all, int side, int64_t round) const {
  return all + (((p.k.data ? side : 0) * p.batch * p.heads + head_) * p.rounds + round) * p.n;
}

// Collects the chunk's tokens, without masked ones. They are sorted by position if attention is
// causal.
void LSHWalk::collect_tokens(int side, int64_t round, int64_t chunk, bool masked,
                             LSHTokens& tokens) {
  const int64_t first = chunk * p.chunk, size = std::min(p.chunk, p.n - first);
  const int32_t* order = in_round(p.order, side, round) + first;
  const uint8_t* mask = masked && p.mask ? p.mask + head_ / p.heads * p.n : nullptr;
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    tokens.position[count] = order[i], tokens.place[count] = int32_t(i);
    count += !mask || mask[order[i]] != 0;
  }
  tokens.count = count;
  if (!p.causal) return;
  std::copy_n(tokens.position, count, unsorted_);
  loops.count_below(unsorted_, count, unsorted_, count, rank_);
  for (int64_t i = 0; i < count; ++i) tokens.position[rank_[i]] = unsorted_[i];
  if (!p.threshold) return;
  std::copy_n(tokens.place, count, unsorted_);
  for (int64_t i = 0; i < count; ++i) tokens.place[rank_[i]] = unsorted_[i];
}

void LSHWalk::gather_queries(int64_t chunk) {
  collect_tokens(0, round_, chunk, p.mask_queries, queries);
  for (int64_t i = 0; i < queries.count; ++i) {
    const int32_t position = queries.position[i];
    kernels.widen(p.dtype, row_of(p, p.q, head_, position), p.dim, queries.rows + i * sizes.dim);
    queries.limits[i] = p.causal ? position + p.attend_self : INT_MAX;
    queries.self[i] = p.attend_self ? -1 : position;
  }
  std::fill(queries.limits + queries.count, queries.limits + sizes.chunk, INT_MIN);
  loops.transpose(queries.rows, queries.count, p.dim, sizes.dim, p.scale * kLog2OfE,
                  queries.columns, sizes.ld);
}

void LSHWalk::gather_keys(int64_t round, int64_t chunk, LSHKeys& to) {
  collect_tokens(1, round, chunk, true, to);
  const auto& from = p.k.data ? p.k : p.q;
  for (int64_t i = 0; i < to.count; ++i) {
    float* row = to.rows + i * sizes.dim;
    kernels.widen(p.dtype, row_of(p, from, head_, to.position[i]), p.dim, row);
    // A vector that was in this row before may have left 0 * inf = NaN in the padding.
    std::fill(row + p.dim, row + sizes.dim, 0.0f);
  }
  normalize(to.rows, to);
  gather_values(to);
}

// Takes the queries of the chunk for its keys, where these are the same.
void LSHWalk::share_queries(LSHKeys& to) {
  to.count = queries.count;
  std::copy_n(queries.position, to.count, to.position);
  std::copy_n(queries.place, to.count, to.place);
  normalize(queries.rows, to);
  gather_values(to);
}

void LSHWalk::gather_values(LSHKeys& to) {
  for (int64_t i = 0; i < to.count; ++i)
    kernels.widen(p.dtype, row_of(p, p.v, head_, to.position[i]), p.v_dim,
                  to.values + i * sizes.v_dim);
}

void LSHWalk::normalize(const float* from, LSHKeys& to) {
  if (p.key_norm != KeyNorm::none)
    loops.normalize(from, to.count, sizes.dim,
                    p.key_norm == KeyNorm::rms ? 1e-6f * float(p.dim) : 0, kMinNorm, to.rows,
                    to.inverse);
  else if (from != to.rows)
    std::copy_n(from, to.count * sizes.dim, to.rows);
}

// Finds how many keys each query sees. The queries of a vector look at as many as the last of them
// sees, in whole tiles.
void LSHWalk::find_heights(int part) {
  const int64_t all = keys[part].count, count = queries.count;
  int32_t *seen = seen_[part], *heights = heights_[part];
  if (p.causal)
    loops.count_below(keys[part].position, all, queries.limits, sizes.chunk, seen);
  else
    std::fill_n(seen, count, int32_t(all));
  int64_t g = 0;
  for (; g * loops.lanes < count; ++g) {
    const int32_t most = seen[std::min(count, (g + 1) * loops.lanes) - 1];
    heights[g] = int32_t(std::min(all, round_up(most, loops.tile_rows)));
  }
  const int32_t height = g ? heights[g - 1] : 0;
  scores.columns = g * loops.lanes;
  heights[g] = height;
}

void LSHWalk::score(float* to) {
  scores.data = to;
  for (int part = 0; part < 2; ++part)
    add_columns(part, keys[part].rows, sizes.dim, queries.columns, p.dim, to);
  if (p.buckets) hide_other_buckets();
  if (p.ranks) correct_duplicates();
}

void LSHWalk::add_columns(int part, const float* rows, int64_t width, const float* columns,
                          int64_t depth, float* to) const {
  const int64_t count = keys[part].count;
  to += scores.parts[part].first * scores.ld;
  for (int64_t j = 0, g = 0; j < count; j += loops.tile_rows) {
    while (g * loops.lanes < scores.columns && heights_[part][g] <= j) ++g;
    const int64_t column = g * loops.lanes;
    if (column == scores.columns) break;
    loops.multiply(std::min(loops.tile_rows, count - j), scores.columns - column, depth,
                   rows + j * width, width, columns + column, sizes.ld, to + j * scores.ld + column,
                   scores.ld, false);
  }
}

void LSHWalk::add_by_query(const float* of, int part, const float* rows, int64_t width,
                           float* to) const {
  of += scores.parts[part].first * scores.ld;
  for (int64_t i = 0; i < queries.count; i += loops.tile_rows) {
    const int64_t here = std::min(loops.tile_rows, queries.count - i);
    loops.multiply_transposed(here, width, seen_[part][i + here - 1], of + i, scores.ld, rows,
                              width, to + i * width, width, true);
  }
}

void LSHWalk::add_by_key(const float* of, int part, const float* rows, int64_t width, float* to,
                         bool add) const {
  const int64_t count = keys[part].count;
  of += scores.parts[part].first * scores.ld;
  for (int64_t j = 0, i = 0; j < count; j += loops.tile_rows) {
    while (i < queries.count && seen_[part][i] <= j) ++i;
    if (i == queries.count && add) break;
    loops.multiply(std::min(loops.tile_rows, count - j), width, queries.count - i,
                   of + j * scores.ld + i, scores.ld, rows + i * width, width, to + j * width,
                   width, add);
  }
}

// ---- which scores count

template <class F>
void LSHWalk::each_score(const F& visit) const {
  for (int part = 0; part < 2; ++part)
    for (int64_t g = 0; g * loops.lanes < scores.columns; ++g) {
      const int64_t end = std::min(queries.count, (g + 1) * loops.lanes);
      for (int64_t j = 0; j < heights_[part][g]; ++j) visit(part, j, g * loops.lanes, end);
    }
}

void LSHWalk::hide_other_buckets() {
  const int32_t *of_query = in_round(p.buckets, 0, round_),
                *of_key = in_round(p.buckets, 1, round_);
  for (int64_t i = 0; i < queries.count; ++i) rank_[i] = of_query[queries.position[i]];
  each_score([&](int part, int64_t j, int64_t begin, int64_t end) {
    const int32_t bucket = of_key[keys[part].position[j]];
    float* x = scores.data + (scores.parts[part].first + j) * scores.ld;
    for (int64_t i = begin; i < end; ++i) x[i] = rank_[i] == bucket ? x[i] : -INFINITY;
  });
}

// Divides the weight of a key by the number of rounds and chunks in which the query sees it.
void LSHWalk::correct_duplicates() {
  const int64_t c = p.chunk, ld = sizes.chunk;
  for (int64_t t = 0; t < p.rounds; ++t)
    for (int64_t i = 0; i < queries.count; ++i) {
      ids_[t * ld + i] = in_round(p.ranks, 0, t)[queries.position[i]] / int32_t(c);
      if (p.buckets) buckets_[t * ld + i] = in_round(p.buckets, 0, t)[queries.position[i]];
    }
  each_score([&](int part, int64_t j, int64_t begin, int64_t end) {
    const int32_t key = keys[part].position[j];
    std::fill(times_ + begin, times_ + end, 0);
    for (int64_t t = 0; t < p.rounds; ++t) {
      const int64_t before = round_before(t);
      const int32_t id = in_round(p.ranks, 1, t)[key] / int32_t(c),
                    id_before = in_round(p.ranks, 1, before)[key] / int32_t(c);
      const bool wraps = p.wrap != Wrap::none && !(before == t && sizes.last == 0) &&
                         !(p.buckets && before != t) && id_before == sizes.last;
      const int32_t bucket = p.buckets ? in_round(p.buckets, 1, t)[key] : 0;
      const int32_t *ids = ids_ + t * ld, *buckets = buckets_ + t * ld;
      for (int64_t i = begin; i < end; ++i) {
        const int32_t seen = (ids[i] == id) + (ids[i] - 1 == id) + (wraps && ids[i] == 0);
        times_[i] += p.buckets && buckets[i] != bucket ? 0 : seen;
      }
    }
    float* x = scores.data + (scores.parts[part].first + j) * scores.ld;
    for (int64_t i = begin; i < end; ++i) x[i] -= logs_[times_[i]];
  });
}

// A query has one row of dropout in each round; its columns are the places in its two chunks.
void LSHWalk::find_dropout_factors(float* to) {
  const float factor = float(1 / (1 - p.threshold / 65536.0));
  for (int64_t i = 0; i < queries.count; ++i) {
    std::fill_n(dropped_, 2 * p.chunk, factor);
    const int64_t row = (head_ * p.rounds + round_) * p.n + chunk_ * p.chunk + queries.place[i];
    kernels.drop(p.seed, row, 0, 2 * p.chunk, p.threshold, dropped_);
    for (int part = 0; part < 2; ++part)
      for (int64_t j = 0; j < keys[part].count; ++j)
        to[(scores.parts[part].first + j) * scores.ld + i] =
            dropped_[part * p.chunk + keys[part].place[j]];
  }
}

void LSHWalk::multiply(const float* factors, float* to) const {
  each_score([&](int part, int64_t j, int64_t begin, int64_t end) {
    const int64_t row = (scores.parts[part].first + j) * scores.ld;
    for (int64_t i = begin; i < end; ++i) to[row + i] *= factors[row + i];
  });
}

}  // namespace pyfast::cpu
