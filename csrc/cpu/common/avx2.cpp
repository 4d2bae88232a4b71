#include "cpu/common/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/common/avx2.h"
#include "cpu/common/interleave.h"
#include "cpu/common/philox.h"

namespace pyfast::cpu {
namespace {

template <DType dtype>
void widen_all(const void* from, int64_t count, float* to) {
  using E = Element<dtype>;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, widen8<dtype>(from, i));
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
    store(to + i, narrow16<dtype>(_mm256_loadu_ps(from + i), _mm256_loadu_ps(from + i + 8)));
  for (; i < count; ++i) to[i] = Element<dtype>::narrow(from[i]);
}

void narrow(DType dtype, const float* from, int64_t count, void* to) {
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, size_t(count) * 4); return;
    case DType::bf16: return narrow_all<DType::bf16>(from, count, static_cast<uint16_t*>(to));
    case DType::f16: return narrow_all<DType::f16>(from, count, static_cast<uint16_t*>(to));
  }
}

template <DType dtype>
float dot_of(const void* a, const float* b, int64_t count) {
  using E = Element<dtype>;
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                    _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int q = 0; q < 4; ++q)
      sums[q] =
          _mm256_fmadd_ps(widen8<dtype>(a, i + 8 * q), _mm256_loadu_ps(b + i + 8 * q), sums[q]);
  float rest = 0;
  for (; i < count; ++i) rest += E::widen(static_cast<const typename E::type*>(a)[i]) * b[i];
  return rest +
         sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

float dot(DType dtype, const void* a, const float* b, int64_t count) {
  switch (dtype) {
    case DType::f32: return dot_of<DType::f32>(a, b, count);
    case DType::bf16: return dot_of<DType::bf16>(a, b, count);
    case DType::f16: return dot_of<DType::f16>(a, b, count);
  }
  return 0;
}

template <int rows, int vectors>
void tile_of(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  __m256 sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    __m256 right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = _mm256_loadu_ps(b + 8 * j);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const __m256 left = _mm256_broadcast_ss(a + i * lda + k);
      for (int j = 0; j < vectors; ++j) sums[i][j] = _mm256_fmadd_ps(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * ldc + 8 * j;
      _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), sums[i][j]) : sums[i][j]);
    }
}

template <int vectors>
void tile(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool add) {
  static constexpr decltype(&tile_of<1, vectors>) tiles[] = {
      tile_of<1, vectors>, tile_of<2, vectors>, tile_of<3, vectors>,
      tile_of<4, vectors>, tile_of<5, vectors>, tile_of<6, vectors>};
  tiles[rows - 1](depth, a, lda, b, ldb, c, ldc, add);
}

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels kernels = {widen, narrow, dot, tile<2>, 6, 16, tile<1>, interleave, drop};
  return kernels;
}

}  // namespace pyfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
