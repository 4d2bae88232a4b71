// Products of many rows. Each thread has a panel of the weight in its cache, and everything is
// added before the only rounding.
//
// Forward, a panel of the weight's rows is the left factor, and x, packed once, is the right one:
// C[panel, m] = W x^T. Backward, dy, packed once, is the left factor, and a panel of the weight's
// columns is the right one: C[m, panel] = dy W. In bf16, where the machine multiplies it, torch's
// brgemm computes a panel's product (AVX512-BF16 or AMX); otherwise the fp32 tiles of Kernels do.
// The low-rank update is added to C in fp32.
#include "cpu/linear/linear.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include "cpu/common/products.h"

namespace pyfast::cpu {
namespace {

constexpr int64_t kMaxPanelRows = 192, kMaxPanelCols = 1024;
// Rows of x at a time, so that what is packed of them stays in the caches.
constexpr int64_t kMaxRowsPerPass = 512;
// Steps of the sum at a time, at most: long runs of a weight's row are read faster.
constexpr int64_t kDepthStep = 1024;
constexpr int64_t kRowPadding = 16;  // because rows a power of two apart would share cache sets
constexpr int64_t kBrgemmDepth = 32;

// ---- Products in fp32 and bf16. T is the type of their factors: float, or uint16_t for bf16.

// Steps of the sum at a time. In fp32, short sums that are added up have smaller errors; in bf16
// the error of bf16 itself hides that.
template <class T>
constexpr int64_t kDepthStepOf = sizeof(T) == 2 ? kDepthStep : 128;

template <class T>
struct Factor : Scratch {
  explicit Factor(int64_t each, int64_t threads = 1)
      : Scratch(round_up(each, 2) * int64_t(sizeof(T)) / 4, threads) {}
  T* of(int64_t thread) const { return reinterpret_cast<T*>(Scratch::of(thread)); }
};

// Rounds a depth up to what the product takes: brgemm takes multiples of 32 steps.
template <class T>
int64_t padded_depth(int64_t depth) {
  return sizeof(T) == 2 ? round_up(depth, kBrgemmDepth) : depth;
}

// Releases the tensor unit, which brgemm keeps until it is told.
template <class T>
struct BrgemmGuard {
  ~BrgemmGuard() {
    if (sizeof(T) == 2) at::native::cpublas::brgemm_release();
  }
};

// Casts a row of x or dy to a factor's type, times `gain` unless that is null.
void load_row(const Kernels& k, DType dtype, const void* from, const float* gain, int64_t count,
              float* to) {
  k.widen(dtype, from, count, to);
  for (int64_t i = 0; gain && i < count; ++i) to[i] *= gain[i];
}

void load_row(const Kernels& k, DType dtype, const void* from, const float* gain, int64_t count,
              uint16_t* to) {
  if (!gain) return void(std::memcpy(to, from, size_t(count) * 2));
  constexpr int64_t kPieceSize = 256;
  float row[kPieceSize];
  for (int64_t i = 0; i < count; i += kPieceSize) {
    const int64_t here = std::min(kPieceSize, count - i);
    load_row(k, dtype, static_cast<const uint16_t*>(from) + i, gain + i, here, row);
    k.narrow(DType::bf16, row, here, to + i);
  }
}

// ---- y = gain (x W^T + S B^T) + bias

// S^T of a segment, [rank][width], for columns `first` .. of C. These are whole tiles, zero outside
// the segment.
struct SegmentColumns {
  int64_t first, width, adapter;
  const float* s;
};

class LowRankUpdate {
 public:
  // C's columns are the positions from .. from + count - 1.
  LowRankUpdate(const Kernels& k, const Linear& p, int64_t from, int64_t count)
      : memory_(p.rank * floats_needed(k, p, count)) {
    float* to = memory_.of(0);
    for (const Segment& s : p.route.segments) {
      const int64_t begin = std::max(s.begin, from) - from,
                    end = std::min(s.end, from + count) - from;
      if (begin >= end || p.rank == 0) continue;
      const int64_t first = begin / k.tile_width * k.tile_width,
                    width = round_up(end, k.tile_width) - first;
      std::fill_n(to, p.rank * width, 0.0f);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < p.rank; ++r)
          to[r * width + i - first] = p.s[p.route.row(from + i) * p.rank + r];
      columns_.push_back({first, width, s.adapter, to});
      to += p.rank * width;
    }
  }
  // Computes c[height, ldc] += B[row ..] S^T.
  void add(const Kernels& k, const Linear& p, int64_t rows, int64_t row, int64_t height, float* c,
           int64_t ldc) const {
    for (const SegmentColumns& part : columns_)
      multiply(k, height, part.width, p.rank, p.b + (part.adapter * rows + row) * p.rank, p.rank,
               part.s, part.width, c + part.first, ldc, true);
  }

 private:
  static int64_t floats_needed(const Kernels& k, const Linear& p, int64_t count) {
    return count + int64_t(p.route.segments.size() + 1) * 2 * k.tile_width;
  }
  Scratch memory_;
  std::vector<SegmentColumns> columns_;
};

// Packs the right factor: panels of `width` rows of x, as [panel][cols][width], in bf16 as
// [panel][cols / 2][width][2]. Missing rows and columns are zero.
template <class T>
void pack_right(const Kernels& k, const Linear& p, int64_t cols, int64_t from, int64_t count,
                int64_t width, const Factor<T>& line, T* to) {
  constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
  const int64_t depth = padded_depth<T>(cols);
  at::parallel_for(0, at::divup(count, width), 1, [&](int64_t begin, int64_t end) {
    T* row = line.of(at::get_thread_num());
    for (int64_t i = begin * width; i < end * width; ++i) {
      std::fill_n(row, depth, T{0});
      if (i < count)
        load_row(k, p.dtype, p.row(p.x, p.route.row(from + i), cols), nullptr, cols, row);
      T* column = to + i / width * depth * width + i % width * pair;
      for (int64_t c = 0; c < depth; c += pair)
        std::memcpy(column + c * width, row + c, sizeof(T) * pair);
    }
  });
}

// Writes y[position from + i][row ..] = gain * c[.., i] + bias.
void write_transposed(const Kernels& k, const Linear& p, int64_t rows, int64_t row, int64_t height,
                      int64_t from, int64_t count, const float* c, int64_t ldc) {
  constexpr int64_t kBlockRows = 16;
  float line[kBlockRows][kMaxPanelRows];
  for (int64_t i = 0; i < count; i += kBlockRows) {
    for (int64_t r = 0; r < height; ++r) {
      const float gain = p.gain ? p.gain[row + r] : 1, bias = p.bias ? p.bias[row + r] : 0;
      for (int64_t j = 0; j < kBlockRows; ++j) line[j][r] = gain * c[r * ldc + i + j] + bias;
    }
    for (int64_t j = 0; j < std::min(kBlockRows, count - i); ++j)
      k.narrow(p.dtype, line[j], height,
               p.row(p.y, p.route.row(from + i + j), rows) + row * item_size(p.dtype));
  }
}

// Returns how many rows of the weight make a panel: as few panels as threads can share evenly.
int64_t panel_height(const Kernels& k, int64_t rows) {
  const int64_t share = at::divup(rows, at::get_num_threads());
  return std::min(kMaxPanelRows,
                  round_up(at::divup(share, at::divup(share, kMaxPanelRows)), k.tile_height));
}

template <class T>
void linear_panels(const FrozenWeight& w, const Linear& p, int64_t from, int64_t count) {
  const Kernels& k = w.k;
  const int64_t rows = w.rows, cols = w.cols, threads = at::get_num_threads(),
                ld = kDepthStepOf<T> + 2 * kRowPadding;
  const int64_t width = sizeof(T) == 2 && count <= 16 ? 16 : k.tile_width,
                panels = at::divup(count, width);
  const int64_t depth = padded_depth<T>(cols), height = panel_height(k, rows),
                ldc = panels * width + kRowPadding;
  const Factor<T> x(panels * width * depth), panel(height * ld, threads), line(depth, threads);
  const Scratch sums(height * ldc, threads), scratch(w.scratch(kDepthStepOf<T>), threads);
  const LowRankUpdate low(k, p, from, count);
  pack_right(k, p, cols, from, count, width, line, x.of(0));
  at::parallel_for(0, at::divup(rows, height), 1, [&](int64_t begin, int64_t end) {
    const BrgemmGuard<T> guard;
    const int thread = at::get_thread_num();
    T* thread_panel = panel.of(thread);
    float* c = sums.of(thread);
    for (int64_t r0 = begin * height; r0 < std::min(rows, end * height); r0 += height) {
      const int64_t here = std::min(height, rows - r0);
      if (cols == 0) std::fill_n(c, here * ldc, 0.0f);
      for (int64_t k0 = 0; k0 < cols; k0 += kDepthStepOf<T>) {
        const int64_t step = std::min(kDepthStepOf<T>, cols - k0), padded = padded_depth<T>(step);
        w.read(r0, here, k0, step, scratch.of(thread), thread_panel, ld);
        for (int64_t r = 0; step < padded && r < here; ++r)
          std::fill(thread_panel + r * ld + step, thread_panel + r * ld + padded, T{0});
        for (int64_t j = 0; j < panels; ++j)
          multiply(k, here, width, padded, thread_panel, ld, x.of(0) + (j * depth + k0) * width,
                   width, c + j * width, ldc, k0 > 0);
      }
      low.add(k, p, rows, r0, here, c, ldc);
      write_transposed(k, p, rows, r0, here, from, count, c, ldc);
    }
  });
}

// ---- dx = (gain dy) W + mask(U A) + add

// Packs the left factor, [step of depth][count][ld].
template <class T>
void pack_left(const Kernels& k, const LinearBackward& p, int64_t rows, int64_t from, int64_t count,
               int64_t ld, T* to) {
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0; r < rows; r += kDepthStepOf<T>) {
        const int64_t step = std::min(kDepthStepOf<T>, rows - r);
        T* row = to + (r / kDepthStepOf<T> * count + i) * ld;
        const char* dy = p.row(p.dy, p.route.row(from + i), rows) + r * item_size(p.dtype);
        load_row(k, p.dtype, dy, p.gain ? p.gain + r : nullptr, step, row);
        std::fill(row + step, row + padded_depth<T>(step), T{0});
      }
  });
}

// Reads the right factor of a step to to[depth][ld]: rows row .. of columns col .., in bf16 in
// pairs of rows. Missing columns of the last tile, and missing rows of the last pairs, are zero.
void read_right(const FrozenWeight& w, int64_t row, int64_t depth, int64_t col, int64_t count,
                float* scratch, float*, float* to, int64_t ld) {
  w.read(row, depth, col, count, scratch, to, ld);
  for (int64_t r = 0; r < depth; ++r)
    std::fill(to + r * ld + count, to + r * ld + round_up(count, w.k.tile_width), 0.0f);
}

void read_right(const FrozenWeight& w, int64_t row, int64_t depth, int64_t col, int64_t count,
                float* scratch, uint16_t* lines, uint16_t* to, int64_t ld) {
  const int64_t width = round_up(count, w.k.tile_width);
  for (int64_t r = 0; r < padded_depth<uint16_t>(depth); r += 2, to += 2 * ld) {
    const int64_t rows_left = std::clamp<int64_t>(depth - r, 0, 2);
    w.read(row + r, rows_left, col, count, scratch, lines, kMaxPanelCols);
    for (int64_t i = 0; i < 2; ++i)
      std::fill(lines + i * kMaxPanelCols + (i < rows_left ? count : 0),
                lines + i * kMaxPanelCols + width, uint16_t{0});
    w.k.interleave(lines, lines + kMaxPanelCols, width, to);
  }
}

// Computes c[count, here] += mask(U A) in columns col .. for the rows at positions from ..
void add_low_rank(const Kernels& k, const LinearBackward& p, int64_t cols, int64_t col,
                  int64_t here, int64_t from, int64_t count, float* a, float* c, int64_t ldc) {
  const int64_t width = round_up(here, k.tile_width);
  float u[16 * 64], product[16 * kMaxPanelCols];
  for (const Segment& s : p.route.segments) {
    const int64_t begin = std::max(s.begin, from), end = std::min(s.end, from + count);
    if (begin >= end) continue;
    for (int64_t r = 0; r < p.rank; ++r) {
      std::copy_n(p.a + (s.adapter * p.rank + r) * cols + col, here, a + r * width);
      std::fill(a + r * width + here, a + (r + 1) * width, 0.0f);
    }
    for (int64_t i = begin; i < end; i += k.tile_height) {
      const int64_t height = std::min(k.tile_height, end - i);
      float* to = p.threshold ? product : c + (i - from) * ldc;
      const int64_t ld = p.threshold ? kMaxPanelCols : ldc;
      for (int64_t r = 0; r < p.rank; r += 64) {
        const int64_t depth = std::min<int64_t>(64, p.rank - r);
        for (int64_t j = 0; j < height; ++j)
          std::copy_n(p.u + p.route.row(i + j) * p.rank + r, depth, u + j * 64);
        multiply(k, height, width, depth, u, 64, a + r * width, width, to, ld,
                 r > 0 || !p.threshold);
      }
      for (int64_t j = 0; p.threshold && j < height; ++j) {
        k.drop(p.seed, p.route.row(i + j), col, here, p.threshold, product + j * kMaxPanelCols);
        for (int64_t q = 0; q < here; ++q)
          c[(i - from + j) * ldc + q] += product[j * kMaxPanelCols + q];
      }
    }
  }
}

// Returns how many columns of the weight make a panel: long runs of its rows, but sums that stay in
// the cache, and work for every thread.
int64_t panel_width(const Kernels& k, int64_t cols, int64_t count) {
  const int64_t share = round_up(at::divup(cols, at::get_num_threads()), k.tile_width);
  return std::min(share, count <= 128 ? kMaxPanelCols : 256);
}

template <class T>
void backward_panels(const FrozenWeight& w, const LinearBackward& p, int64_t from, int64_t count) {
  const Kernels& k = w.k;
  const int64_t rows = w.rows, cols = w.cols, threads = at::get_num_threads();
  const int64_t panel_cols = panel_width(k, cols, count);
  const int64_t ld = kDepthStepOf<T> + 2 * kRowPadding, ldw = panel_cols + kRowPadding,
                ldc = panel_cols + kRowPadding;
  const Factor<T> packed(at::divup(rows, kDepthStepOf<T>) * count * ld),
      panel(kDepthStepOf<T> * ldw, threads);
  const Factor<T> lines(2 * kMaxPanelCols, threads);
  const Scratch sums(count * ldc, threads), scratch(w.scratch(panel_cols), threads);
  const Scratch a(std::max<int64_t>(1, p.rank) * panel_cols, threads);
  pack_left(k, p, rows, from, count, ld, packed.of(0));
  at::parallel_for(0, at::divup(cols, panel_cols), 1, [&](int64_t begin, int64_t end) {
    const BrgemmGuard<T> guard;
    const int thread = at::get_thread_num();
    T* thread_panel = panel.of(thread);
    float* c = sums.of(thread);
    for (int64_t c0 = begin * panel_cols; c0 < std::min(cols, end * panel_cols); c0 += panel_cols) {
      const int64_t here = std::min(panel_cols, cols - c0), width = round_up(here, k.tile_width);
      if (rows == 0) std::fill_n(c, count * ldc, 0.0f);
      for (int64_t r0 = 0; r0 < rows; r0 += kDepthStepOf<T>) {
        const int64_t step = std::min(kDepthStepOf<T>, rows - r0);
        read_right(w, r0, step, c0, here, scratch.of(thread), lines.of(thread), thread_panel, ldw);
        multiply(k, count, width, padded_depth<T>(step),
                 packed.of(0) + r0 / kDepthStepOf<T> * count * ld, ld, thread_panel, ldw, c, ldc,
                 r0 > 0);
      }
      if (p.rank) add_low_rank(k, p, cols, c0, here, from, count, a.of(thread), c, ldc);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = p.route.row(from + i), offset = c0 * item_size(p.dtype);
        if (p.add) {
          float summand[kMaxPanelCols];
          k.widen(p.dtype, p.row(p.add, row, cols) + offset, here, summand);
          for (int64_t j = 0; j < here; ++j) c[i * ldc + j] += summand[j];
        }
        k.narrow(p.dtype, c + i * ldc, here, p.row(p.dx, row, cols) + offset);
      }
    }
  });
}

}  // namespace

void linear(const FrozenWeight& w, const Linear& p) {
  if (p.m <= 0 || w.rows == 0) return;
  const bool bf16 = multiplies_bf16(p.dtype);
  // brgemm is faster from six dense rows on.
  if (p.m <= (bf16 && w.dense() ? 5 : kFewRows)) return linear_few_rows(w, p);
  for (int64_t i = 0; i < p.m; i += kMaxRowsPerPass) {
    const int64_t count = std::min(kMaxRowsPerPass, p.m - i);
    bf16 ? linear_panels<uint16_t>(w, p, i, count) : linear_panels<float>(w, p, i, count);
  }
}

void linear_backward(const FrozenWeight& w, const LinearBackward& p) {
  if (w.cols == 0) return;
  for (int64_t i = 0; i < p.m; i += kMaxRowsPerPass) {
    const int64_t count = std::min(kMaxRowsPerPass, p.m - i);
    multiplies_bf16(p.dtype) ? backward_panels<uint16_t>(w, p, i, count)
                             : backward_panels<float>(w, p, i, count);
  }
}

}  // namespace pyfast::cpu
