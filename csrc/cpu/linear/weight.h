// A frozen weight [rows, cols], dense or in 4 bits, that is read a rectangle at a time.
#pragma once

#include <cstring>
#include <optional>

#include "cpu/common/kernels.h"
#include "cpu/common/scratch.h"
#include "cpu/nf4/weight_view.h"

namespace pyfast::cpu {

struct DenseView {
  const void* data;
  DType dtype;
  int64_t rows, cols;

  const char* row(int64_t i) const {
    return static_cast<const char*>(data) + i * cols * item_size(dtype);
  }
};

class FrozenWeight {
 public:
  explicit FrozenWeight(const NF4View& view)
      : rows(view.rows), cols(view.cols), k(kernels()), nf4_(std::in_place, view) {}
  explicit FrozenWeight(const DenseView& view)
      : rows(view.rows), cols(view.cols), k(kernels()), dense_(view) {}
  FrozenWeight(const FrozenWeight&) = delete;

  const int64_t rows, cols;
  const Kernels& k;

  const NF4Weight* nf4() const { return nf4_ ? &*nf4_ : nullptr; }
  const DenseView* dense() const { return nf4_ ? nullptr : &dense_; }

  // Returns how many floats of scratch `read` needs for `count` columns.
  int64_t scratch(int64_t count) const { return nf4_ ? nf4_->max_scales(count) : count; }

  // Writes columns col .. col + count - 1 of rows row .. to to[height][ld], in fp32 or bf16.
  template <class T>
  void read(int64_t row, int64_t height, int64_t col, int64_t count, float* scratch, T* to,
            int64_t ld) const {
    for (int64_t r = row; r < row + height; ++r, to += ld) {
      prefetch(r, col, count);
      if (nf4_)
        nf4_->kernels.decode(as<T>(), nf4_->run(r * cols + col, count, scratch), to);
      else
        copy(at(r, col), count, scratch, to);
    }
  }

 private:
  template <class T>
  static constexpr DType as() {
    return sizeof(T) == 4 ? DType::f32 : DType::bf16;
  }
  const char* at(int64_t row, int64_t col) const {
    return dense_.row(row) + col * item_size(dense_.dtype);
  }
  void copy(const char* from, int64_t count, float*, float* to) const {
    k.widen(dense_.dtype, from, count, to);
  }
  void copy(const char* from, int64_t count, float* scratch, uint16_t* to) const {
    if (dense_.dtype == DType::bf16) {
      std::memcpy(to, from, size_t(count) * 2);
    } else {
      k.widen(dense_.dtype, from, count, scratch);
      k.narrow(DType::bf16, scratch, count, to);
    }
  }
  // Asks for the bytes of a later row in time: the hardware does not foresee jumps from row to row.
  void prefetch(int64_t row, int64_t col, int64_t count) const {
    constexpr int64_t kRowsAhead = 32, kCacheLine = 64;
    if (row + kRowsAhead >= rows) return;
    const char* from = nf4_ ? reinterpret_cast<const char*>(nf4_->view.packed) +
                                  ((row + kRowsAhead) * cols + col) / 2
                            : at(row + kRowsAhead, col);
    const int64_t bytes = nf4_ ? count / 2 : count * item_size(dense_.dtype);
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(from + i);
  }

  std::optional<NF4Weight> nf4_;
  DenseView dense_{};
};

}  // namespace pyfast::cpu
