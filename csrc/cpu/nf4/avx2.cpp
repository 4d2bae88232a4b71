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
#include "cpu/nf4/inner_loops.h"

namespace pyfast::cpu {
namespace {

// ---- decode. A 16-entry byte shuffle gives each byte of a result; unpacking joins the bytes.

// Turns bytes that were duplicated pairwise (b b) into their nibbles, in order.
__m256i split(__m256i pairs) {
  __m256i high = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), _mm256_set1_epi16(0x000f));
  return _mm256_or_si256(high, _mm256_and_si256(pairs, _mm256_set1_epi16(0x0f00)));
}

struct Planes {
  __m256i plane[4];

  explicit Planes(const Codebook& code) {
    for (int p = 0; p < 4; ++p) plane[p] = twice(code.plane[p]);
  }
  // Looks up 32 indices: 4 x 8 floats, bytes 0-3 of both lanes first.
  void operator()(__m256i index, __m256* to) const {
    __m256i a = _mm256_shuffle_epi8(plane[0], index), b = _mm256_shuffle_epi8(plane[1], index);
    __m256i c = _mm256_shuffle_epi8(plane[2], index), d = _mm256_shuffle_epi8(plane[3], index);
    __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
    to[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(ab, cd));
    to[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(ab, cd));
    ab = _mm256_unpackhi_epi8(a, b), cd = _mm256_unpackhi_epi8(c, d);
    to[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(ab, cd));
    to[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(ab, cd));
  }
};

template <DType dtype>
// Decodes to 16-bit results: the table holds the block's 16 values, rounded.
struct Lookup {
  const float* code;
  __m256i low, high;

  explicit Lookup(const Codebook& book) : code(book.value) {}
  void scale(float scale) {
    __m256 by = _mm256_set1_ps(scale);
    __m256i value = narrow16<dtype>(_mm256_mul_ps(_mm256_loadu_ps(code), by),
                                    _mm256_mul_ps(_mm256_loadu_ps(code + 8), by));
    __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(value, _mm256_set1_epi16(0xff)),
                                        _mm256_srli_epi16(value, 8));
    bytes = _mm256_permute4x64_epi64(bytes, 0xd8);
    low = _mm256_permute2x128_si256(bytes, bytes, 0x00);
    high = _mm256_permute2x128_si256(bytes, bytes, 0x11);
  }
  void many(const uint8_t* packed, uint16_t* to) const {
    const __m256i order = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11,  //
                                           4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15);
    __m256i index = split(_mm256_shuffle_epi8(twice(packed), order));
    __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
    store(to, _mm256_unpacklo_epi8(l, h));
    store(to + 16, _mm256_unpackhi_epi8(l, h));
  }
};

template <>
struct Lookup<DType::f32> {
  Planes planes;
  __m256 by;

  explicit Lookup(const Codebook& book) : planes(book) {}
  void scale(float scale) { by = _mm256_set1_ps(scale); }
  void many(const uint8_t* packed, float* to) const {
    const __m256i order = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                           2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    __m256 code[4];
    planes(split(_mm256_shuffle_epi8(twice(packed), order)), code);
    for (int q = 0; q < 4; ++q) _mm256_storeu_ps(to + 8 * q, _mm256_mul_ps(code[q], by));
  }
};

// ---- quantize

__m256i size_bits(__m256 x) {
  return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

template <DType dtype>
float absmax_of(const void* from, int64_t count) {
  __m256i max = _mm256_setzero_si256();  // compared as bits, where a NaN is above all numbers
  for (int64_t i = 0; i < count; i += 8)
    max = _mm256_max_epu32(max, size_bits(widen8<dtype>(from, i)));
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
  half = _mm_max_epu32(half, _mm_unpackhi_epi64(half, half));
  half = _mm_max_epu32(half, _mm_srli_epi64(half, 32));
  return float_of(uint32_t(_mm_cvtsi128_si32(half)));
}

// Counts the thresholds below x by a binary search in registers. Each of its four steps looks its
// thresholds up by the rank so far.
struct Rank {
  __m256 first, second, third, fourth;

  explicit Rank(const float* t)
      : first(_mm256_set1_ps(t[7])),
        second(_mm256_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0)),
        third(_mm256_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0)),
        fourth(_mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14])) {}

  __m256i operator()(__m256 x) const {
    __m256i rank = step(_mm256_setzero_si256(), x, first);
    rank = step(rank, x, _mm256_permutevar8x32_ps(second, rank));
    rank = step(rank, x, _mm256_permutevar8x32_ps(third, rank));
    return step(rank, x, _mm256_permutevar8x32_ps(fourth, rank));
  }
  static __m256i step(__m256i rank, __m256 x, __m256 threshold) {
    __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));  // -1: yes
    return _mm256_sub_epi32(_mm256_add_epi32(rank, rank), above);
  }
};

template <DType dtype>
void quantize_block(const void* from, int64_t count, const Rank& rank, __m256i order, float inverse,
                    uint8_t* packed) {
  const __m256 by = _mm256_set1_ps(inverse);
  const __m256i unshuffle = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < count; i += 32, packed += 16) {
    __m256i r[4];
    for (int q = 0; q < 4; ++q) r[q] = rank(_mm256_mul_ps(widen8<dtype>(from, i + 8 * q), by));
    __m256i bytes =
        _mm256_packus_epi16(_mm256_packs_epi32(r[0], r[1]), _mm256_packs_epi32(r[2], r[3]));
    bytes = _mm256_shuffle_epi8(order, _mm256_permutevar8x32_epi32(bytes, unshuffle));
    __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
    pairs = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(pairs));
  }
}

template <DType dtype>
void quantize_all(const void* from, int64_t blocks, int64_t blocksize, const float* thresholds,
                  const uint8_t* order, uint8_t* packed, float* absmax) {
  const Rank rank(thresholds);
  const __m256i codes = twice(order);
  auto x = static_cast<const typename Element<dtype>::type*>(from);
  for (int64_t b = 0; b < blocks; ++b, x += blocksize, packed += blocksize / 2) {
    absmax[b] = absmax_of<dtype>(x, blocksize);
    const float inverse = 1.0f / (absmax[b] < 1e-38f ? 1e-38f : absmax[b]);
    quantize_block<dtype>(x, blocksize, rank, codes, inverse, packed);
  }
}

void quantize(DType dtype, const void* from, int64_t blocks, int64_t blocksize,
              const float* thresholds, const uint8_t* order, uint8_t* packed, float* absmax) {
  switch (dtype) {
    case DType::f32:
      return quantize_all<DType::f32>(from, blocks, blocksize, thresholds, order, packed, absmax);
    case DType::bf16:
      return quantize_all<DType::bf16>(from, blocks, blocksize, thresholds, order, packed, absmax);
    case DType::f16:
      return quantize_all<DType::f16>(from, blocks, blocksize, thresholds, order, packed, absmax);
  }
}

// ---- products

// Puts a group in the order in which fused_dot_of meets its elements: first those of high nibbles,
// then those of low nibbles, each as Planes gives them.
void arrange(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kFusedGroup, from += kFusedGroup)
    for (int low = 0; low < 2; ++low)
      for (int q = 0; q < 4; ++q)
        for (int lane = 0; lane < 2; ++lane)
          for (int j = 0; j < 4; ++j) *to++ = from[32 * lane + 8 * q + 2 * j + low];
}

template <int m>
void fused_dot_of(const PackedRun& run, const float* x, float* y) {
  const Planes planes(*run.code);
  const uint8_t* packed = run.packed + run.begin / 2;
  const int64_t first = run.begin >> run.block_shift;
  __m256 sums[m];
  for (int i = 0; i < m; ++i) sums[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < run.count; k += kFusedGroup, packed += 32) {
    __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i low = _mm256_set1_epi8(15);
    __m256 code[8];
    planes(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), code);
    planes(_mm256_and_si256(bytes, low), code + 4);
    __m256 scale = _mm256_broadcast_ss(run.scales + (((run.begin + k) >> run.block_shift) - first));
    for (int i = 0; i < m; ++i) {
      const float* xi = x + i * arranged_size(run.count) + k;
      __m256 a = _mm256_mul_ps(code[0], _mm256_loadu_ps(xi)),
             b = _mm256_mul_ps(code[1], _mm256_loadu_ps(xi + 8));
      for (int q = 2; q < 8; q += 2) {
        a = _mm256_fmadd_ps(code[q], _mm256_loadu_ps(xi + 8 * q), a);
        b = _mm256_fmadd_ps(code[q + 1], _mm256_loadu_ps(xi + 8 * q + 8), b);
      }
      sums[i] = _mm256_fmadd_ps(_mm256_add_ps(a, b), scale, sums[i]);
    }
  }
  for (int i = 0; i < m; ++i) y[i] = sum(sums[i]);
}

void fused_dot(const PackedRun& run, int64_t m, const float* x, float* y) {
  static constexpr decltype(&fused_dot_of<1>) dots[] = {fused_dot_of<1>, fused_dot_of<2>,
                                                        fused_dot_of<3>, fused_dot_of<4>};
  dots[m - 1](run, x, y);
}

}  // namespace

const NF4Kernels& avx2_nf4_kernels() {
  static const NF4Kernels kernels = {quantize, decode<Lookup>, fused_dot,
                                     arrange,  avx2_fixed_dot, avx2_arrange_fixed};
  return kernels;
}

}  // namespace pyfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
