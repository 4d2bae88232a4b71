// A few rows of bf16 times decoded codes in bf16: each instruction does two products a lane, so
// there are half as many as in fp32.
//
// The code table is rounded to bf16, not each weight, and the scale multiplies a block's sum in
// fp32. A rounded code has the same error in every weight that has the code. So the table is first
// multiplied by a factor with which NF4's 16 codes round well: the error is 1.3e-3 of the weights'
// rms, where rounding each weight gives 1.7e-3. FP4's codes, times 1.5, are exact.
#include "cpu/nf4/kernel_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's headers for AVX-512 warn (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

namespace pyfast::cpu {
namespace {

// Returns the factor. NF4 is recognized by its second code, -0.6962; FP4's is 0.0052.
float gain_of(const Codebook& code) {
  return code.value[1] < -0.69f && code.value[1] > -0.70f ? 1.297119140625f : 1.5f;
}

// Returns the table twice: the lowest bit of the next nibble may be an index's fifth bit.
__m512i table_of(const Codebook& code) {
  const float gain = gain_of(code);
  uint16_t rounded[32];
  for (int i = 0; i < 32; ++i) rounded[i] = to_bf16(code.value[i % 16] * gain);
  return _mm512_loadu_si512(rounded);
}

template <int m>
void dot_of(const PackedRun& run, const float* x, float* y) {
  const __m512i table = table_of(*run.code);
  const uint8_t* packed = run.packed + run.begin / 2;
  const int64_t first = run.begin >> run.block_shift;
  __m512 sums[m];
  for (int i = 0; i < m; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < run.count; k += kFusedGroup, packed += 32) {
    const __m512i words =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    const __m512bh even = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
    const __m512bh odd = (__m512bh)_mm512_permutexvar_epi16(words, table);
    const __m512 scale = _mm512_set1_ps(run.scales[((run.begin + k) >> run.block_shift) - first]);
    for (int i = 0; i < m; ++i) {
      const float* xi = x + i * arranged_size(run.count) + k / 2;
      __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), even, (__m512bh)_mm512_loadu_si512(xi));
      sum = _mm512_dpbf16_ps(sum, odd, (__m512bh)_mm512_loadu_si512(xi + 16));
      sums[i] = _mm512_fmadd_ps(sum, scale, sums[i]);
    }
  }
  for (int i = 0; i < m; ++i) y[i] = _mm512_reduce_add_ps(sums[i]) / gain_of(*run.code);
}

}  // namespace

void avx512_bf16_fixed_dot(const PackedRun& run, int64_t m, const float* x, float* y) {
  static constexpr decltype(&dot_of<1>) dots[] = {dot_of<1>, dot_of<2>, dot_of<3>, dot_of<4>};
  dots[m - 1](run, x, y);
}

// Puts a group's 32 even elements before its 32 odd ones, as the bytes hold them.
bool avx512_bf16_arrange_fixed(const Codebook&, const float* from, int64_t count, float* to) {
  auto bf16 = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; i += kFusedGroup, from += kFusedGroup)
    for (int odd = 0; odd < 2; ++odd)
      for (int j = 0; j < kFusedGroup / 2; ++j) *bf16++ = to_bf16(from[2 * j + odd]);
  return true;
}

}  // namespace pyfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
