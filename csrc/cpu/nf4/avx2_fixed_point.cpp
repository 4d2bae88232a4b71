#include "cpu/nf4/kernel_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/common/avx2.h"

namespace pyfast::cpu {
namespace {

// A few rows of bf16 times a packed weight, in 16-bit integers: two byte shuffles look a code up,
// where a float takes four. A group of x is (high + low / 8192) * unit, 13 bits and a sign each, so
// that the 8 products that a lane adds stay below 2^31. The error is at most 2^-27 of the group's
// largest element. Groups that span more than 2^18 are refused, so it is at most 2^-9 of any
// element: no more than the cost of rounding x to bf16.
template <class Float, class Int>
struct FixedPointRow {
  Int *high, *low;
  Float* scale;

  FixedPointRow(Float* at, int64_t count)
      : high(reinterpret_cast<Int*>(at)), low(high + count), scale(at + count) {}
};

constexpr float kMaxHigh = 8191, kLowSteps = 8192, kMaxSpan = 1 << 18;

// Narrows 16 integers from 32 to 16 bits, in order.
__m256i narrow_integers(__m256 a, __m256 b) {
  const __m256i lanes = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  return _mm256_permute4x64_epi64(lanes, 0xd8);
}

// Stores 32 elements, 16 from each argument, as the nibbles lie: those at even places to to[0..15],
// those at odd places to to[32..47].
void store_by_nibble(__m256i lane0, __m256i lane1, int16_t* to) {
  const auto even = [](__m256i pairs) {
    return _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16);
  };
  const __m256i low = _mm256_packs_epi32(even(lane0), even(lane1));
  const __m256i high =
      _mm256_packs_epi32(_mm256_srai_epi32(lane0, 16), _mm256_srai_epi32(lane1, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(low, 0xd8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_permute4x64_epi64(high, 0xd8));
}

// Computes both planes of a group: high = round(x / unit), low = round((x / unit - high) *
// kLowSteps).
void split_group(const float* from, float unit, int16_t* high, int16_t* low) {
  const __m256 by = _mm256_set1_ps(unit), step = _mm256_set1_ps(kLowSteps);
  __m256 rounded[8], rest[8];
  for (int q = 0; q < 8; ++q) {
    const __m256 value = _mm256_div_ps(_mm256_loadu_ps(from + 8 * q), by);
    rounded[q] = _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    rest[q] = _mm256_mul_ps(_mm256_sub_ps(value, rounded[q]), step);
  }
  for (int half = 0; half < 2; ++half) {
    const int a = 2 * half, b = a + 4;
    store_by_nibble(narrow_integers(rounded[a], rounded[a + 1]),
                    narrow_integers(rounded[b], rounded[b + 1]), high + 16 * half);
    store_by_nibble(narrow_integers(rest[a], rest[a + 1]), narrow_integers(rest[b], rest[b + 1]),
                    low + 16 * half);
  }
}

uint32_t largest_of(__m256i x) {
  __m128i top = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(top, _mm_shuffle_epi32(top, 0xb1))));
}

// Finds the group's largest magnitude, which is NaN if there is one, and its smallest except zero.
void span_of(const float* from, float* largest, float* smallest) {
  const __m256i ones = _mm256_set1_epi32(-1);
  __m256i max_bits = _mm256_setzero_si256(),
          max_complement = _mm256_setzero_si256();  // of ~(bits - 1), where zero does not count
  for (int i = 0; i < kFusedGroup; i += 8) {
    const __m256i bits =
        _mm256_srli_epi32(_mm256_slli_epi32(_mm256_castps_si256(_mm256_loadu_ps(from + i)), 1), 1);
    max_bits = _mm256_max_epu32(max_bits, bits);
    max_complement =
        _mm256_max_epu32(max_complement, _mm256_xor_si256(_mm256_add_epi32(bits, ones), ones));
  }
  *largest = float_of(largest_of(max_bits));
  *smallest = float_of(~largest_of(max_complement) + 1);
}

}  // namespace

bool avx2_arrange_fixed(const Codebook& code, const float* from, int64_t count, float* to) {
  const FixedPointRow<float, int16_t> x(to, count);
  for (int64_t g = 0; g < count / kFusedGroup; ++g, from += kFusedGroup) {
    float largest, smallest;
    span_of(from, &largest, &smallest);
    if (!(largest < 1e18f)) return false;
    if (largest != 0 && (largest < 1e-15f || smallest * kMaxSpan < largest)) return false;
    const float unit = largest != 0 ? largest / kMaxHigh : 1;
    x.scale[g] = unit * code.unit;
    split_group(from, unit, x.high + g * kFusedGroup, x.low + g * kFusedGroup);
  }
  return true;
}

namespace {

__m256 multiply_fixed(const __m256i* code, const int16_t* x) {
  auto at = reinterpret_cast<const __m256i*>(x);
  __m256i a = _mm256_madd_epi16(code[0], _mm256_loadu_si256(at));
  __m256i b = _mm256_madd_epi16(code[1], _mm256_loadu_si256(at + 1));
  a = _mm256_add_epi32(a, _mm256_madd_epi16(code[2], _mm256_loadu_si256(at + 2)));
  b = _mm256_add_epi32(b, _mm256_madd_epi16(code[3], _mm256_loadu_si256(at + 3)));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
}

template <int m>
void fixed_dot_of(const PackedRun& run, const float* x, float* y) {
  const __m256i low_plane = twice(run.code->fixed[0]), high_plane = twice(run.code->fixed[1]);
  const uint8_t* packed = run.packed + run.begin / 2;
  const int64_t first = run.begin >> run.block_shift;
  __m256 sums[m];
  for (int i = 0; i < m; ++i) sums[i] = _mm256_setzero_ps();
  for (int64_t k = 0, g = 0; k < run.count; k += kFusedGroup, ++g, packed += 32) {
    __builtin_prefetch(packed + 1024);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)),
                  low = _mm256_set1_epi8(15);
    const __m256i index[2] = {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low),
                              _mm256_and_si256(bytes, low)};
    __m256i code[4];
    for (int n = 0; n < 2; ++n) {
      const __m256i l = _mm256_shuffle_epi8(low_plane, index[n]),
                    h = _mm256_shuffle_epi8(high_plane, index[n]);
      code[2 * n] = _mm256_unpacklo_epi8(l, h);
      code[2 * n + 1] = _mm256_unpackhi_epi8(l, h);
    }
    const __m256 scale =
        _mm256_broadcast_ss(run.scales + (((run.begin + k) >> run.block_shift) - first));
    for (int i = 0; i < m; ++i) {
      const FixedPointRow<const float, const int16_t> xi(x + i * arranged_size(run.count),
                                                         run.count);
      const __m256 high = multiply_fixed(code, xi.high + k),
                   low_part = multiply_fixed(code, xi.low + k);
      const __m256 both = _mm256_fmadd_ps(low_part, _mm256_set1_ps(1 / kLowSteps), high);
      sums[i] =
          _mm256_fmadd_ps(both, _mm256_mul_ps(scale, _mm256_broadcast_ss(xi.scale + g)), sums[i]);
    }
  }
  for (int i = 0; i < m; ++i) y[i] = sum(sums[i]);
}

}  // namespace

void avx2_fixed_dot(const PackedRun& run, int64_t m, const float* x, float* y) {
  static constexpr decltype(&fixed_dot_of<1>) dots[] = {fixed_dot_of<1>, fixed_dot_of<2>,
                                                        fixed_dot_of<3>, fixed_dot_of<4>};
  dots[m - 1](run, x, y);
}

}  // namespace pyfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
