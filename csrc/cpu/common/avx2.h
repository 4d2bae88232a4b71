// Functions that several AVX2 files use. Included after a file has switched AVX2 on; the anonymous
// namespace keeps each copy in its file.
#pragma once

#include <immintrin.h>

#include "cpu/common/dtype.h"

namespace pyfast::cpu {
namespace {

inline __m256i twice(__m128i x) { return _mm256_broadcastsi128_si256(x); }
inline __m256i twice(const void* x) {
  return twice(_mm_loadu_si128(static_cast<const __m128i*>(x)));
}

inline float sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline void store(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

template <DType dtype>
__m256 widen8(const void* from, int64_t i) {
  if (dtype == DType::f32) return _mm256_loadu_ps(static_cast<const float*>(from) + i);
  __m128i x =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i));
  if (dtype == DType::f16) return _mm256_cvtph_ps(x);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

// Rounds each lane to the nearest bf16, in the low half of its 32 bits.
inline __m256i to_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
}

template <DType dtype>
__m256i narrow16(__m256 a, __m256 b) {
  if (dtype == DType::f16) {
    __m128i low = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), low);
  }
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16(a), to_bf16(b)), 0xd8);
}

}  // namespace
}  // namespace pyfast::cpu
