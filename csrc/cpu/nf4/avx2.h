// What the AVX2 files share. Included after a file has switched AVX2 on; the anonymous namespace
// keeps each copy in it.
#pragma once

#include <immintrin.h>

namespace pyfast::cpu {
namespace {

__m256i twice(__m128i x) { return _mm256_broadcastsi128_si256(x); }
__m256i twice(const void* x) { return twice(_mm_loadu_si128(static_cast<const __m128i*>(x))); }

float sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace
}  // namespace pyfast::cpu
