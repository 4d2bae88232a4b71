// Products c (+)= a b where b lies packed in panels of columns. T is float, for the tiles of
// kernels(), or uint16_t, for bf16 through torch's brgemm. brgemm's right factor holds two
// consecutive steps of the sum side by side.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>

#include "cpu/adapter/adapter.h"
#include "cpu/common/products.h"
#include "cpu/common/scratch.h"

namespace pyfast::cpu {

constexpr int64_t kMaxDepthStep = 256, kMaxPanelWidth = 128,
                  kColumnUnit = 32;  // a multiple of any tile_width

template <class T>
inline constexpr bool kIsBF16 = sizeof(T) == 2;
template <class T>
inline constexpr DType kDTypeOf = kIsBF16<T> ? DType::bf16 : DType::f32;
template <class T>
inline constexpr int64_t kDepthUnit = kIsBF16<T> ? 32 : 1;  // AMX takes 32 steps at a time
template <class T>
inline constexpr int64_t kDepthStep =
    kIsBF16<T> ? kMaxDepthStep : kMaxDepthStep / 2;  // so that a panel of b stays in L1

inline const void* address_of(Values v, int64_t i) {
  return static_cast<const char*>(v.data) + i * item_size(v.dtype);
}

// Computes to[count] = from[begin ...]; count <= kMaxDepthStep.
template <class T>
void convert(Values from, int64_t begin, int64_t count, T* to) {
  const Kernels& k = kernels();
  if constexpr (!kIsBF16<T>) {
    k.widen(from.dtype, address_of(from, begin), count, to);
  } else if (from.dtype == DType::bf16) {
    std::memcpy(to, address_of(from, begin), size_t(count) * sizeof(T));
  } else {
    float row_floats[kMaxDepthStep];
    k.widen(from.dtype, address_of(from, begin), count, row_floats);
    k.narrow(DType::bf16, row_floats, count, to);
  }
}

template <class T>
class Packed {
 public:
  Packed(int64_t depth, int64_t cols)
      : depth_(depth),
        cols_(cols),
        width_(std::min(round_up(cols, kColumnUnit), kMaxPanelWidth)),
        stride_(round_up(depth, kDepthUnit<T>) * width_),
        memory_(at::divup(
            at::divup(cols, std::max<int64_t>(width_, 1)) * stride_ * int64_t(sizeof(T)), 4)) {}

  // Packs b[k][n] = from[row + k][col + n]; `depth` and `cols` are at most the constructor's.
  void pack_rows(Values from, int64_t ld, int64_t row, int64_t col, int64_t depth, int64_t cols) {
    depth_ = depth, cols_ = cols;
    for (int64_t k = 0; k < depth_; k += kDepthStep<T>)
      for (int64_t n = 0; n < cols_; n += width_) rows_of(from, ld, row, col, k, n);
  }
  // Packs b[k][n] = from[k][n].
  void pack_rows_in_parallel(Values from) {
    each_piece([&](int64_t k, int64_t n) { rows_of(from, cols_, 0, 0, k, n); });
  }
  // Packs b[k][n] = from[n][k].
  void pack_transposed_in_parallel(Values from) {
    each_piece([&](int64_t k, int64_t n) { columns_of(from, k, n); });
  }

  // Computes c[rows, count] (+)= a[rows, steps] b[k : k + steps, n : n + count], where n begins a
  // panel. Both a and c have room for whole units; a's padding is zero.
  void multiply(const T* a, int64_t lda, int64_t rows, int64_t k, int64_t steps, int64_t n,
                int64_t count, float* c, int64_t ldc, bool add) const {
    for (int64_t done = 0; done < steps; done += kDepthStep<T>)
      for (int64_t j = 0; j < count; j += width_)
        multiply_panel(a + done, lda, rows, at(k + done, n + j),
                       std::min(kDepthStep<T>, steps - done), std::min(width_, count - j), c + j,
                       ldc, add || done);
    if (steps == 0 && !add)
      for (int64_t i = 0; i < rows; ++i) std::fill_n(c + i * ldc, count, 0.0f);
  }

 private:
  void multiply_panel(const T* a, int64_t lda, int64_t rows, const T* b, int64_t steps,
                      int64_t count, float* c, int64_t ldc, bool add) const {
    const int64_t width = kIsBF16<T> ? round_up(count, kColumnUnit) : count;
    cpu::multiply(kernels(), rows, width, round_up(steps, kDepthUnit<T>), a, lda, b, width_, c, ldc,
                  add);
  }

  T* at(int64_t k, int64_t n) const {
    return reinterpret_cast<T*>(memory_.of(0)) + n / width_ * stride_ +
           k * width_;  // k is even where steps lie in pairs
  }

  template <class F>
  void each_piece(const F& pack) {
    const int64_t steps = at::divup(depth_, kDepthStep<T>),
                  pieces = steps * at::divup(cols_, std::max<int64_t>(width_, 1));
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i % steps * kDepthStep<T>, i / steps * width_);
    });
  }

  // Packs a piece: kDepthStep steps of one panel.
  void rows_of(Values from, int64_t ld, int64_t row, int64_t col, int64_t k0, int64_t n) {
    const int64_t here = std::min(width_, cols_ - n), end = std::min(depth_, k0 + kDepthStep<T>);
    const auto line = [&](int64_t k, T* to) {
      const int64_t filled = k < end ? here : 0;
      if (filled) convert(from, (row + k) * ld + col + n, filled, to);
      std::fill(to + filled, to + width_, T(0));
    };
    if constexpr (kIsBF16<T>) {
      T even[kMaxPanelWidth], odd[kMaxPanelWidth];
      for (int64_t k = k0; k < round_up(end, kDepthUnit<T>); k += 2) {
        line(k, even), line(k + 1, odd);
        T* to = at(k, n);
        for (int64_t i = 0; i < width_; ++i) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
      }
    } else {
      for (int64_t k = k0; k < end; ++k) line(k, at(k, n));
    }
  }

  void columns_of(Values from, int64_t k0, int64_t n) {
    const int64_t end = std::min(depth_, k0 + kDepthStep<T>),
                  steps = round_up(end - k0, kDepthUnit<T>);
    T line[kMaxDepthStep];
    T* to = at(k0, n);
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t filled = n + i < cols_ ? end - k0 : 0;
      if (filled) convert(from, (n + i) * depth_ + k0, filled, line);
      std::fill(line + filled, line + steps, T(0));
      if constexpr (kIsBF16<T>) {
        for (int64_t k = 0; k < steps; k += 2)
          std::memcpy(to + k * width_ + 2 * i, line + k, 2 * sizeof(T));
      } else {
        for (int64_t k = 0; k < steps; ++k) to[k * width_ + i] = line[k];
      }
    }
  }

  int64_t depth_, cols_, width_, stride_;
  Scratch memory_;
};

}  // namespace pyfast::cpu
