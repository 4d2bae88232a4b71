#include "cpu/common/interleave.h"
#include "cpu/common/kernels.h"
#include "cpu/common/philox.h"

namespace pyfast::cpu {
namespace {

template <DType dtype>
void widen_all(const void* from, int64_t count, float* to) {
  auto x = static_cast<const typename Element<dtype>::type*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = Element<dtype>::widen(x[i]);
}

void widen(DType dtype, const void* from, int64_t count, float* to) {
  switch (dtype) {
    case DType::f32: return widen_all<DType::f32>(from, count, to);
    case DType::bf16: return widen_all<DType::bf16>(from, count, to);
    case DType::f16: return widen_all<DType::f16>(from, count, to);
  }
}

template <DType dtype>
void narrow_all(const float* from, int64_t count, void* to) {
  auto x = static_cast<typename Element<dtype>::type*>(to);
  for (int64_t i = 0; i < count; ++i) x[i] = Element<dtype>::narrow(from[i]);
}

void narrow(DType dtype, const float* from, int64_t count, void* to) {
  switch (dtype) {
    case DType::f32: return narrow_all<DType::f32>(from, count, to);
    case DType::bf16: return narrow_all<DType::bf16>(from, count, to);
    case DType::f16: return narrow_all<DType::f16>(from, count, to);
  }
}

constexpr int kWidth = 16, kHeight = 4;

template <DType dtype>
float dot_of(const void* from, const float* b, int64_t count) {
  using E = Element<dtype>;
  auto a = static_cast<const typename E::type*>(from);
  float sums[kWidth] = {}, total = 0;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    for (int j = 0; j < kWidth; ++j) sums[j] += E::widen(a[i + j]) * b[i + j];
  for (; i < count; ++i) total += E::widen(a[i]) * b[i];
  for (float sum : sums) total += sum;
  return total;
}

float dot(DType dtype, const void* a, const float* b, int64_t count) {
  switch (dtype) {
    case DType::f32: return dot_of<DType::f32>(a, b, count);
    case DType::bf16: return dot_of<DType::bf16>(a, b, count);
    case DType::f16: return dot_of<DType::f16>(a, b, count);
  }
  return 0;
}

template <int rows, int cols>
void tile_of(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  float sums[rows][cols] = {};
  for (int64_t k = 0; k < depth; ++k, b += ldb)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < cols; ++j) sums[i][j] += a[i * lda + k] * b[j];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) c[i * ldc + j] = add ? c[i * ldc + j] + sums[i][j] : sums[i][j];
}

template <int cols>
void tile(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool add) {
  static constexpr decltype(&tile_of<1, cols>) tiles[] = {tile_of<1, cols>, tile_of<2, cols>,
                                                          tile_of<3, cols>, tile_of<4, cols>};
  tiles[rows - 1](depth, a, lda, b, ldb, c, ldc, add);
}

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels kernels = {widen,  narrow,           dot,        tile<kWidth>, kHeight,
                                  kWidth, tile<kWidth / 2>, interleave, drop};
  return kernels;
}

}  // namespace pyfast::cpu
