// Functions that several AVX-512 files use. Included after a file has switched AVX-512 on; the
// anonymous namespace keeps each copy in its file.
#pragma once

#include <immintrin.h>

#include "cpu/common/dtype.h"

namespace pyfast::cpu {
namespace {

constexpr int kRoundToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

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
  if (dtype == DType::f16) return _mm512_cvtps_ph(x, kRoundToNearest);
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0)));
}

}  // namespace
}  // namespace pyfast::cpu
