#include "cpu/lsh/hash.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/common/philox.h"
#include "cpu/common/products.h"
#include "cpu/common/scratch.h"

namespace pyfast::cpu {
namespace {

constexpr int64_t block = 64,
                  most_directions = 48;  // whose products stay in L1; multiples of any tile's sizes

struct Nearest {
  float high[block], low[block];
  int32_t highest[block], lowest[block];
};

}  // namespace
}  // namespace pyfast::cpu

#define LOOPS "cpu/lsh/hash_loops.h"
#include "cpu/common/each_isa.h"

namespace pyfast::cpu {

namespace {

// to[dim][block] = tokens `first` .. of a head, zeros beyond the last.
void transpose(const LSHHash& p, const char* head, int64_t first, float* to) {
  float row[block * 4];
  for (int64_t l = 0; l < block; ++l) {
    if (first + l >= p.n) {
      for (int64_t k = 0; k < p.dim; ++k) to[k * block + l] = 0;
      continue;
    }
    const char* token = head + (first + l) * p.stride[2] * item_size(p.dtype);
    for (int64_t k0 = 0; k0 < p.dim; k0 += block * 4) {
      const int64_t here = std::min(block * 4, p.dim - k0);
      kernels().widen(p.dtype, token + k0 * item_size(p.dtype), here, row);
      for (int64_t k = 0; k < here; ++k) to[(k0 + k) * block + l] = row[k];
    }
  }
}

// The best of `half` directions and their opposites, times `unit`, is added to ids[block].
void add_nearest(const LSHHash& p, const float* directions, int64_t half, const float* tokens,
                 float* products, int32_t unit, int32_t* ids) {
  static const auto nearest = BEST(nearest);
  Nearest best;
  std::fill_n(best.high, block, -std::numeric_limits<float>::infinity());
  std::fill_n(best.low, block, std::numeric_limits<float>::infinity());
  std::fill_n(best.highest, block, 0), std::fill_n(best.lowest, block, 0);  // what NaN gets
  for (int64_t i = 0; i < half; i += most_directions) {
    const int64_t here = std::min(most_directions, half - i);
    multiply(kernels(), here, block, p.dim, directions + i * p.dim, p.dim, tokens, block, products,
             block, false);
    nearest(products, here, int32_t(i), best);
  }
  for (int64_t l = 0; l < block; ++l)
    ids[l] +=
        unit * (-best.low[l] > best.high[l] ? int32_t(half) + best.lowest[l] : best.highest[l]);
}

}  // namespace

void lsh_hash(const LSHHash& p, int32_t* to) {
  const int64_t blocks = at::divup(p.n, block), threads = at::get_num_threads();
  const int64_t width = std::accumulate(p.factors, p.factors + p.factor_count, int64_t{0}) / 2;
  const Scratch transposed(p.dim * block, threads), sums(most_directions * block, threads);
  at::parallel_for(0, p.batch * p.heads * blocks, 4, [&](int64_t begin, int64_t end) {
    float *tokens = transposed.of(at::get_thread_num()), *products = sums.of(at::get_thread_num());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block, head = i / blocks, b = head / p.heads,
                    h = head % p.heads;
      const int64_t offset = (b * p.stride[0] + h * p.stride[1]) * item_size(p.dtype);
      transpose(p, static_cast<const char*>(p.x) + offset, first, tokens);
      const int64_t own = p.each_batch * b * (p.each_head ? p.heads : 1) + p.each_head * h;
      const float* directions = p.directions + own * p.rounds * width * p.dim;
      for (int64_t r = 0; r < p.rounds; ++r) {
        int32_t ids[block] = {}, unit = 1;
        for (int64_t f = 0; f < p.factor_count;
             directions += p.factors[f] / 2 * p.dim, unit *= p.factors[f], ++f)
          add_nearest(p, directions, p.factors[f] / 2, tokens, products, unit, ids);
        std::copy_n(ids, std::min(block, p.n - first), to + (head * p.rounds + r) * p.n + first);
      }
    }
  });
}

void lsh_rotations(uint64_t seed, int64_t count, float* to) {
  constexpr int64_t step = 4 * lanes;
  constexpr double turn = 6.283185307179586, unit = 0x1p-24;
  for (int64_t i = 0; i < count; i += step) {
    const uint64_t group = uint64_t(i / 4);
    uint32_t word[4][lanes];
    float normal[step];
    philox(seed, (uint64_t{1} << 62) + (group >> 32), uint32_t(group), word);
    for (int64_t l = 0; l < lanes; ++l)
      for (int pair = 0; pair < 2; ++pair) {
        const double radius =
            std::sqrt(-2 * std::log((double(word[2 * pair][l] >> 8) + 0.5) * unit));
        const double angle = turn * 0x1p-32 * double(word[2 * pair + 1][l]);
        normal[4 * l + 2 * pair] = float(radius * std::cos(angle));
        normal[4 * l + 2 * pair + 1] = float(radius * std::sin(angle));
      }
    std::copy_n(normal, std::min(step, count - i), to + i);
  }
}

bool lsh_sort(const int32_t* buckets, int64_t rows, int64_t n, int64_t n_buckets, int32_t* order,
              int32_t* ranks) {
  // Digits of the id, the lowest first, each sorted stably: one, where counting the buckets is no
  // more work than n.
  const int shift = n_buckets <= std::max<int64_t>(n, 4096) ? 31 : 11;
  const bool several = shift < 31;
  const int64_t digits = several ? int64_t{1} << shift : n_buckets, threads = at::get_num_threads();
  const Scratch counts(digits + 1, threads), spare(several ? n : 0, threads);
  std::atomic<bool> in_range{true};
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n)),
                   [&](int64_t begin, int64_t end) {
                     auto* count = reinterpret_cast<int32_t*>(counts.of(at::get_thread_num()));
                     auto* other = reinterpret_cast<int32_t*>(spare.of(at::get_thread_num()));
                     for (int64_t row = begin; row < end; ++row) {
                       const int32_t* ids = buckets + row * n;
                       bool good = true;
                       for (int64_t i = 0; i < n; ++i) good &= ids[i] >= 0 && ids[i] < n_buckets;
                       if (!good) {
                         in_range = false;
                         continue;
                       }
                       int32_t *to = order + row * n, *rank = ranks + row * n;
                       std::iota(to, to + n, 0);
                       for (int low = 0; low < 31 && n_buckets - 1 >= int64_t{1} << low;
                            low += shift) {
                         const auto digit = [&](int32_t i) {
                           return ids[i] >> low & int32_t((uint32_t{1} << shift) - 1);
                         };
                         std::fill_n(count, digits + 1, 0);
                         for (int64_t i = 0; i < n; ++i) ++count[digit(int32_t(i)) + 1];
                         std::partial_sum(count, count + digits, count);
                         if (several) std::copy_n(to, n, other);
                         for (int64_t i = 0; i < n; ++i) {
                           const int32_t position = several ? other[i] : int32_t(i);
                           to[count[digit(position)]++] = position;
                         }
                       }
                       for (int64_t i = 0; i < n; ++i) rank[to[i]] = int32_t(i);
                     }
                   });
  return in_range;
}

}  // namespace pyfast::cpu
