#include "cpu/nf4/kernel_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's own AVX-512 headers (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "cpu/common/philox.h"
#include "cpu/nf4/inner_loops.h"

namespace pyfast::cpu {
namespace {

constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

template <DType dtype>
__m512 widen16(const void* from, int64_t i) {
  if (dtype == DType::f32) return _mm512_loadu_ps(static_cast<const float*>(from) + i);
  __m256i x =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + i));
  if (dtype == DType::f16) return _mm512_cvtph_ps(x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

template <DType dtype>
__m256i narrow16(__m512 x) {
  if (dtype == DType::f16) return _mm512_cvtps_ph(x, nearest);
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0)));
}

template <DType dtype>
void widen_all(const void* from, int64_t count, float* to) {
  using E = Element<dtype>;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, widen16<dtype>(from, i));
  for (; i < count; ++i) to[i] = E::widen(static_cast<const typename E::type*>(from)[i]);
}

void widen(DType dtype, const void* from, int64_t count, float* to) {
  switch (dtype) {
    case DType::f32: return widen_all<DType::f32>(from, count, to);
    case DType::bf16: return widen_all<DType::bf16>(from, count, to);
    case DType::f16: return widen_all<DType::f16>(from, count, to);
  }
}

template <DType dtype>
void narrow_all(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        narrow16<dtype>(_mm512_loadu_ps(from + i)));
  for (; i < count; ++i) to[i] = Element<dtype>::narrow(from[i]);
}

void narrow(DType dtype, const float* from, int64_t count, void* to) {
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, size_t(count) * 4); return;
    case DType::bf16: return narrow_all<DType::bf16>(from, count, static_cast<uint16_t*>(to));
    case DType::f16: return narrow_all<DType::f16>(from, count, static_cast<uint16_t*>(to));
  }
}

// ---- decode: vpermps holds the 16 codes and looks at the low four bits of an index only.

// Eight bytes as 16 indices, in order: each 64-bit half of a lane pair shifted to its own nibble.
__m512i indices(const uint8_t* packed) {
  uint32_t words[2];
  std::memcpy(words, packed, 8);
  __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(int(words[0])), 0xff00, int(words[1]));
  return _mm512_srlv_epi32(
      both, _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24));
}

template <DType dtype>
struct Lookup {  // 16-bit results: the table holds the block's 16 values, rounded
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
    // vpermw looks at five bits: the table's upper half is never asked for.
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
  __m512i max = _mm512_setzero_si512();  // as bits: a NaN is above all numbers
  for (int64_t i = 0; i < count; i += 16) {
    __m512i bits = _mm512_castps_si512(widen16<dtype>(from, i));
    max = _mm512_max_epu32(max, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return float_of(_mm512_reduce_max_epu32(max));
}

struct Rank {  // a binary search in registers: each of its four steps looks its thresholds up by
               // the rank so far
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

template <DType dtype>
float dot_of(const void* a, const float* b, int64_t count) {
  using E = Element<dtype>;
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    for (int q = 0; q < 4; ++q)
      sums[q] =
          _mm512_fmadd_ps(widen16<dtype>(a, i + 16 * q), _mm512_loadu_ps(b + i + 16 * q), sums[q]);
  float rest = 0;
  for (; i < count; ++i) rest += E::widen(static_cast<const typename E::type*>(a)[i]) * b[i];
  return rest + _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]),
                                                   _mm512_add_ps(sums[2], sums[3])));
}

float dot(DType dtype, const void* a, const float* b, int64_t count) {
  switch (dtype) {
    case DType::f32: return dot_of<DType::f32>(a, b, count);
    case DType::bf16: return dot_of<DType::bf16>(a, b, count);
    case DType::f16: return dot_of<DType::f16>(a, b, count);
  }
  return 0;
}

// fused_dot_of holds a group's eight words twice and shifts them by 4 q bits, the upper copy by 16
// more.
void arrange(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += fused_group, from += fused_group)
    for (int q = 0; q < 4; ++q)
      for (int half = 0; half < 2; ++half)
        for (int word = 0; word < 8; ++word) *to++ = from[8 * word + ((4 * half + q) ^ 1)];
}

template <int m>
void fused_dot_of(const Run& run, const float* x, float* y) {
  const __m512 table = _mm512_loadu_ps(run.code->value);
  const __m512i upper = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16);
  const uint8_t* packed = run.packed + run.begin / 2;
  const int64_t first = run.begin >> run.block_shift;
  __m512 sums[m];
  for (int i = 0; i < m; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < run.count; k += fused_group, packed += 32) {
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

void fused_dot(const Run& run, int64_t m, const float* x, float* y) {
  static constexpr decltype(&fused_dot_of<1>) dots[] = {fused_dot_of<1>, fused_dot_of<2>,
                                                        fused_dot_of<3>, fused_dot_of<4>};
  dots[m - 1](run, x, y);
}

template <int rows, int vectors>
void tile_of(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  __m512 sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    __m512 right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = _mm512_loadu_ps(b + 16 * j);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const __m512 left = _mm512_set1_ps(a[i * lda + k]);
      for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_fmadd_ps(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * ldc + 16 * j;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) : sums[i][j]);
    }
}

template <int vectors>
void tile(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool add) {
  static constexpr decltype(&tile_of<1, vectors>) tiles[] = {
      tile_of<1, vectors>, tile_of<2, vectors>,  tile_of<3, vectors>,  tile_of<4, vectors>,
      tile_of<5, vectors>, tile_of<6, vectors>,  tile_of<7, vectors>,  tile_of<8, vectors>,
      tile_of<9, vectors>, tile_of<10, vectors>, tile_of<11, vectors>, tile_of<12, vectors>};
  tiles[rows - 1](depth, a, lda, b, ldb, c, ldc, add);
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels kernels = {widen,     narrow,  quantize, decode<Lookup>, dot,
                                  fused_dot, arrange, nullptr,  nullptr,        tile<2>,
                                  12,        32,      tile<1>,  interleave,     drop};
  return kernels;
}

}  // namespace pyfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
