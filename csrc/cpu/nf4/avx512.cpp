#include "cpu/nf4/kernel_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's headers for AVX-512 warn (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "cpu/common/avx512.h"
#include "cpu/nf4/inner_loops.h"

namespace pyfast::cpu {
namespace {

// ---- decode. vpermps holds the 16 codes and looks at the low four bits of an index only.

// Splits eight bytes into 16 indices, in order: each 64-bit half of a lane pair is shifted to its
// own nibble.
__m512i indices(const uint8_t* packed) {
  uint32_t words[2];
  std::memcpy(words, packed, 8);
  __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(int(words[0])), 0xff00, int(words[1]));
  return _mm512_srlv_epi32(
      both, _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24));
}

template <DType dtype>
// Decodes to 16-bit results: the table holds the block's 16 values, rounded.
struct Lookup {
  const float* code;
  __m512i value;

  explicit Lookup(const Codebook& book) : code(book.value) {}
  void scale(float scale) {
    value = _mm512_castsi256_si512(
        narrow16<dtype>(_mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale))));
  }
  void many(const uint8_t* packed, uint16_t* to) const {
    __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    __m512i low = _mm512_slli_epi32(_mm512_and_si512(words, _mm512_set1_epi32(15)), 16);
    // vpermw looks at five bits. The fifth is 0, so the table's upper half is never read.
    __m512i index = _mm512_or_si512(_mm512_srli_epi32(words, 4), low);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, value));
  }
};

template <>
struct Lookup<DType::f32> {
  __m512 code, by;

  explicit Lookup(const Codebook& book) : code(_mm512_loadu_ps(book.value)) {}
  void scale(float scale) { by = _mm512_set1_ps(scale); }
  void many(const uint8_t* packed, float* to) const {
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_permutexvar_ps(indices(packed), code), by));
    _mm512_storeu_ps(to + 16, _mm512_mul_ps(_mm512_permutexvar_ps(indices(packed + 8), code), by));
  }
};

// ---- quantize

template <DType dtype>
float absmax_of(const void* from, int64_t count) {
  __m512i max = _mm512_setzero_si512();  // compared as bits, where a NaN is above all numbers
  for (int64_t i = 0; i < count; i += 16) {
    __m512i bits = _mm512_castps_si512(widen16<dtype>(from, i));
    max = _mm512_max_epu32(max, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return float_of(_mm512_reduce_max_epu32(max));
}

// Counts the thresholds below x by a binary search in registers. Each of its four steps looks its
// thresholds up by the rank so far.
struct Rank {
  __m512 first, second, third, fourth;

  explicit Rank(const float* t)
      : first(_mm512_set1_ps(t[7])),
        second(_mm512_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        third(_mm512_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        fourth(_mm512_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14], 0, 0, 0, 0, 0, 0,
                              0, 0)) {}

  __m512i operator()(__m512 x) const {
    __m512i rank = step(_mm512_setzero_si512(), x, first);
    rank = step(rank, x, _mm512_permutexvar_ps(rank, second));
    rank = step(rank, x, _mm512_permutexvar_ps(rank, third));
    return step(rank, x, _mm512_permutexvar_ps(rank, fourth));
  }
  static __m512i step(__m512i rank, __m512 x, __m512 threshold) {
    rank = _mm512_add_epi32(rank, rank);
    __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
  }
};

template <DType dtype>
void quantize_block(const void* from, int64_t count, const Rank& rank, __m128i order, float inverse,
                    uint8_t* packed) {
  const __m512 by = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < count; i += 16, packed += 8) {
    __m128i codes = _mm512_cvtepi32_epi8(rank(_mm512_mul_ps(widen16<dtype>(from, i), by)));
    __m128i pairs = _mm_maddubs_epi16(_mm_shuffle_epi8(order, codes),
                                      _mm_set1_epi16(0x0110));  // 16 * even + odd
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm_packus_epi16(pairs, pairs));
  }
}

template <DType dtype>
void quantize_all(const void* from, int64_t blocks, int64_t blocksize, const float* thresholds,
                  const uint8_t* order, uint8_t* packed, float* absmax) {
  const Rank rank(thresholds);
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
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

// Puts a group in the order of fused_dot_of, which holds the group's eight words twice and shifts
// them by 4 q bits, the upper copy by 16 more.
void arrange(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kFusedGroup, from += kFusedGroup)
    for (int q = 0; q < 4; ++q)
      for (int half = 0; half < 2; ++half)
        for (int word = 0; word < 8; ++word) *to++ = from[8 * word + ((4 * half + q) ^ 1)];
}

template <int m>
void fused_dot_of(const PackedRun& run, const float* x, float* y) {
  const __m512 table = _mm512_loadu_ps(run.code->value);
  const __m512i upper = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16);
  const uint8_t* packed = run.packed + run.begin / 2;
  const int64_t first = run.begin >> run.block_shift;
  __m512 sums[m];
  for (int i = 0; i < m; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < run.count; k += kFusedGroup, packed += 32) {
    __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    __m512i words = _mm512_srlv_epi32(_mm512_broadcast_i64x4(bytes), upper);
    __m512 code[4];
    code[0] = _mm512_permutexvar_ps(words, table);
    code[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
    code[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 8), table);
    code[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 12), table);
    const __m512 scale = _mm512_set1_ps(run.scales[((run.begin + k) >> run.block_shift) - first]);
    for (int i = 0; i < m; ++i) {
      const float* xi = x + i * arranged_size(run.count) + k;
      __m512 a = _mm512_mul_ps(code[0], _mm512_loadu_ps(xi)),
             b = _mm512_mul_ps(code[1], _mm512_loadu_ps(xi + 16));
      a = _mm512_fmadd_ps(code[2], _mm512_loadu_ps(xi + 32), a);
      b = _mm512_fmadd_ps(code[3], _mm512_loadu_ps(xi + 48), b);
      sums[i] = _mm512_fmadd_ps(_mm512_add_ps(a, b), scale, sums[i]);
    }
  }
  for (int i = 0; i < m; ++i) y[i] = _mm512_reduce_add_ps(sums[i]);
}

void fused_dot(const PackedRun& run, int64_t m, const float* x, float* y) {
  static constexpr decltype(&fused_dot_of<1>) dots[] = {fused_dot_of<1>, fused_dot_of<2>,
                                                        fused_dot_of<3>, fused_dot_of<4>};
  dots[m - 1](run, x, y);
}

}  // namespace

const NF4Kernels& avx512_nf4_kernels() {
  static const NF4Kernels kernels = {quantize, decode<Lookup>, fused_dot,
                                     arrange,  nullptr,        nullptr};
  return kernels;
}

}  // namespace pyfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
