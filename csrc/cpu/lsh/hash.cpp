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

constexpr int64_t kBlock = 64,
                  kMaxDirections = 48;  // whose products stay in L1; multiples of any tile's sizes

struct Nearest {
  float high[kBlock], low[kBlock];
  int32_t highest[kBlock], lowest[kBlock];
};

}  // namespace
}  // namespace pyfast::cpu

#define LOOPS "cpu/lsh/hash_loops.h"
#include "cpu/common/each_isa.h"

namespace pyfast::cpu {

namespace {

// Writes tokens `first` .. of a head to to[dim][kBlock], with zeros beyond the last token.
void transpose(const LSHHash& p, const char* head, int64_t first, float* to) {
  float row[kBlock * 4];
  for (int64_t l = 0; l < kBlock; ++l) {
    if (first + l >= p.n) {
      for (int64_t k = 0; k < p.dim; ++k) to[k * kBlock + l] = 0;
      continue;
    }
    const char* token = head + (first + l) * p.stride[2] * item_size(p.dtype);
    for (int64_t k0 = 0; k0 < p.dim; k0 += kBlock * 4) {
      const int64_t here = std::min(kBlock * 4, p.dim - k0);
      kernels().widen(p.dtype, token + k0 * item_size(p.dtype), here, row);
      for (int64_t k = 0; k < here; ++k) to[(k0 + k) * kBlock + l] = row[k];
    }
  }
}

// Adds to ids[kBlock] the best of `half` directions and their opposites, times `unit`.
void add_nearest(const LSHHash& p, const float* directions, int64_t half, const float* tokens,
                 float* products, int32_t unit, int32_t* ids) {
  static const auto nearest = BEST(nearest);
  Nearest best;
  std::fill_n(best.high, kBlock, -std::numeric_limits<float>::infinity());
  std::fill_n(best.low, kBlock, std::numeric_limits<float>::infinity());
  std::fill_n(best.highest, kBlock, 0), std::fill_n(best.lowest, kBlock, 0);  // the result for NaN
  for (int64_t i = 0; i < half; i += kMaxDirections) {
    const int64_t here = std::min(kMaxDirections, half - i);
    multiply(kernels(), here, kBlock, p.dim, directions + i * p.dim, p.dim, tokens, kBlock,
             products, kBlock, false);
    nearest(products, here, int32_t(i), best);
  }
  for (int64_t l = 0; l < kBlock; ++l)
    ids[l] +=
        unit * (-best.low[l] > best.high[l] ? int32_t(half) + best.lowest[l] : best.highest[l]);
}

}  // namespace

void lsh_hash(const LSHHash& p, int32_t* to) {
  const int64_t blocks = at::divup(p.n, kBlock), threads = at::get_num_threads();
  const int64_t width = std::accumulate(p.factors, p.factors + p.factor_count, int64_t{0}) / 2;
  const Scratch transposed(p.dim * kBlock, threads), sums(kMaxDirections * kBlock, threads);
  at::parallel_for(0, p.batch * p.heads * blocks, 4, [&](int64_t begin, int64_t end) {
    float *tokens = transposed.of(at::get_thread_num()), *products = sums.of(at::get_thread_num());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock, head = i / blocks, b = head / p.heads,
                    h = head % p.heads;
      const int64_t offset = (b * p.stride[0] + h * p.stride[1]) * item_size(p.dtype);
      transpose(p, static_cast<const char*>(p.x) + offset, first, tokens);
      const int64_t set = p.each_batch * b * (p.each_head ? p.heads : 1) + p.each_head * h;
      const float* directions = p.directions + set * p.rounds * width * p.dim;
      for (int64_t r = 0; r < p.rounds; ++r) {
        int32_t ids[kBlock] = {}, unit = 1;
        for (int64_t f = 0; f < p.factor_count;
             directions += p.factors[f] / 2 * p.dim, unit *= p.factors[f], ++f)
          add_nearest(p, directions, p.factors[f] / 2, tokens, products, unit, ids);
        std::copy_n(ids, std::min(kBlock, p.n - first), to + (head * p.rounds + r) * p.n + first);
      }
    }
  });
}

void lsh_rotations(uint64_t seed, int64_t count, float* to) {
  constexpr int64_t kStep = 4 * kPhiloxLanes;
  constexpr double kTwoPi = 6.283185307179586, kUnit = 0x1p-24;
  for (int64_t i = 0; i < count; i += kStep) {
    const uint64_t group = uint64_t(i / 4);
    uint32_t word[4][kPhiloxLanes];
    float normal[kStep];
    philox(seed, (uint64_t{1} << 62) + (group >> 32), uint32_t(group), word);
    for (int64_t l = 0; l < kPhiloxLanes; ++l)
      for (int pair = 0; pair < 2; ++pair) {
        const double radius =
            std::sqrt(-2 * std::log((double(word[2 * pair][l] >> 8) + 0.5) * kUnit));
        const double angle = kTwoPi * 0x1p-32 * double(word[2 * pair + 1][l]);
        normal[4 * l + 2 * pair] = float(radius * std::cos(angle));
        normal[4 * l + 2 * pair + 1] = float(radius * std::sin(angle));
      }
    std::copy_n(normal, std::min(kStep, count - i), to + i);
  }
}

namespace {

// Sorts positions by the digits of their ids, the lowest digit first, each stably. There is one
// digit if counting all buckets is no more work than n.
struct DigitSort {
  DigitSort(int64_t n, int64_t n_buckets)
      : n(n),
        n_buckets(n_buckets),
        bits(n_buckets <= std::max<int64_t>(n, 4096) ? 31 : 11),
        has_several_digits(bits < 31),
        digit_values(has_several_digits ? int64_t{1} << bits : n_buckets) {}

  // Computes the positions by (id, position). `count` has room for digit_values + 1 numbers, and
  // `previous` for n where there are several digits.
  void run(const int32_t* ids, int32_t* count, int32_t* previous, int32_t* positions) const {
    std::iota(positions, positions + n, 0);
    for (int shift = 0; shift < 31 && n_buckets - 1 >= int64_t{1} << shift; shift += bits) {
      const auto digit = [&](int32_t i) {
        return ids[i] >> shift & int32_t((uint32_t{1} << bits) - 1);
      };
      std::fill_n(count, digit_values + 1, 0);
      for (int64_t i = 0; i < n; ++i) ++count[digit(int32_t(i)) + 1];
      std::partial_sum(count, count + digit_values, count);
      if (has_several_digits) std::copy_n(positions, n, previous);
      for (int64_t i = 0; i < n; ++i) {
        const int32_t position = has_several_digits ? previous[i] : int32_t(i);
        positions[count[digit(position)]++] = position;
      }
    }
  }

  const int64_t n, n_buckets;
  const int bits;  // of a digit
  const bool has_several_digits;
  const int64_t digit_values;
};

bool are_in_range(const int32_t* ids, int64_t n, int64_t n_buckets) {
  bool in_range = true;
  for (int64_t i = 0; i < n; ++i) in_range &= ids[i] >= 0 && ids[i] < n_buckets;
  return in_range;
}

}  // namespace

bool lsh_sort(const int32_t* buckets, int64_t rows, int64_t n, int64_t n_buckets, int32_t* order,
              int32_t* ranks) {
  const DigitSort sort(n, n_buckets);
  const int64_t threads = at::get_num_threads(),
                grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n));
  const Scratch counts(sort.digit_values + 1, threads),
      previous(sort.has_several_digits ? n : 0, threads);
  std::atomic<bool> in_range{true};
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    auto* count = reinterpret_cast<int32_t*>(counts.of(at::get_thread_num()));
    auto* spare = reinterpret_cast<int32_t*>(previous.of(at::get_thread_num()));
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* ids = buckets + row * n;
      if (!are_in_range(ids, n, n_buckets)) {
        in_range = false;
        continue;
      }
      int32_t *positions = order + row * n, *rank = ranks + row * n;
      sort.run(ids, count, spare, positions);
      for (int64_t i = 0; i < n; ++i) rank[positions[i]] = int32_t(i);
    }
  });
  return in_range;
}

}  // namespace pyfast::cpu
