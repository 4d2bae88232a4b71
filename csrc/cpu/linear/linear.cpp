// Many rows: threads, panels of the weight in a thread's cache, and what is added before the one
// rounding.
//
// Forward, a panel of the weight's rows is the left factor and x, packed once, the right one:
// C[panel, m] = W x^T. Backward, dy, packed once, is the left and a panel of the weight's columns
// the right one: C[m, panel] = dy W. In bf16, where the machine multiplies it, torch's brgemm does
// a panel's product (AVX512-BF16 or AMX), else the fp32 tiles of Kernels do. The low-rank half is
// added to C in fp32.
#include "cpu/linear/linear.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include "cpu/common/products.h"

namespace pyfast::cpu {
namespace {

constexpr int64_t panel_rows = 192, most_cols = 1024;
constexpr int64_t most_m = 512;  // rows of x at a time: what is packed of them stays in the caches
constexpr int64_t depth_step =
    1024;  // of the sum, at a time, at most: long runs of a weight's row are read faster
constexpr int64_t pad = 16;  // rows a power of two apart would share cache sets
constexpr int64_t brgemm_depth = 32;

// ---- The two kinds of product. T is what its factors are held in.

// Of the sum, at a time. In fp32 short sums, added up, err less; in bf16 its own error hides that.
template <class T>
constexpr int64_t step_of = sizeof(T) == 2 ? depth_step : 128;

template <class T>
struct Factor : Scratch {
  explicit Factor(int64_t each, int64_t threads = 1)
      : Scratch(round_up(each, 2) * int64_t(sizeof(T)) / 4, threads) {}
  T* of(int64_t thread) const { return reinterpret_cast<T*>(Scratch::of(thread)); }
};

// brgemm's steps of the sum come in multiples of 32.
template <class T>
int64_t whole(int64_t depth) {
  return sizeof(T) == 2 ? round_up(depth, brgemm_depth) : depth;
}

template <class T>
struct Products {  // brgemm holds on to the tensor unit until it is told
  ~Products() {
    if (sizeof(T) == 2) at::native::cpublas::brgemm_release();
  }
};

// A row of x or dy, scaled by `gain` or not, as a factor.
void load_row(const Kernels& k, DType dtype, const void* from, const float* gain, int64_t count,
              float* to) {
  k.widen(dtype, from, count, to);
  for (int64_t i = 0; gain && i < count; ++i) to[i] *= gain[i];
}

void load_row(const Kernels& k, DType dtype, const void* from, const float* gain, int64_t count,
              uint16_t* to) {
  if (!gain) return void(std::memcpy(to, from, size_t(count) * 2));
  constexpr int64_t some = 256;
  float row[some];
  for (int64_t i = 0; i < count; i += some) {
    const int64_t here = std::min(some, count - i);
    load_row(k, dtype, static_cast<const uint16_t*>(from) + i, gain + i, here, row);
    k.narrow(DType::bf16, row, here, to + i);
  }
}

// ---- y = gain (x W^T + S B^T) + bias

// S^T of a segment, [rank][width], for columns `first` .. of C: whole tiles, zero outside the
// segment.
struct Columns {
  int64_t first, width, adapter;
  const float* s;
};

class LowRank {
 public:
  // C's columns are the positions from .. from + count - 1.
  LowRank(const Kernels& k, const Linear& p, int64_t from, int64_t count)
      : memory_(p.rank * most(k, p, count)) {
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
      all_.push_back({first, width, s.adapter, to});
      to += p.rank * width;
    }
  }
  // c[height, ldc] += B[row ..] S^T
  void add(const Kernels& k, const Linear& p, int64_t rows, int64_t row, int64_t height, float* c,
           int64_t ldc) const {
    for (const Columns& part : all_)
      multiply(k, height, part.width, p.rank, p.b + (part.adapter * rows + row) * p.rank, p.rank,
               part.s, part.width, c + part.first, ldc, true);
  }

 private:
  static int64_t most(const Kernels& k, const Linear& p, int64_t count) {
    return count + int64_t(p.route.segments.size() + 1) * 2 * k.tile_width;
  }
  Scratch memory_;
  std::vector<Columns> all_;
};

// The right factor: panels of `width` rows of x, [panel][cols][width], in bf16 [panel][cols /
// 2][width][2]; missing rows and columns are zero.
template <class T>
void pack_right(const Kernels& k, const Linear& p, int64_t cols, int64_t from, int64_t count,
                int64_t width, const Factor<T>& line, T* to) {
  constexpr int64_t pair = sizeof(T) == 2 ? 2 : 1;
  const int64_t depth = whole<T>(cols);
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

// y[position from + i][row ..] = gain * c[.., i] + bias
void write_transposed(const Kernels& k, const Linear& p, int64_t rows, int64_t row, int64_t height,
                      int64_t from, int64_t count, const float* c, int64_t ldc) {
  constexpr int64_t block = 16;
  float line[block][panel_rows];
  for (int64_t i = 0; i < count; i += block) {
    for (int64_t r = 0; r < height; ++r) {
      const float gain = p.gain ? p.gain[row + r] : 1, bias = p.bias ? p.bias[row + r] : 0;
      for (int64_t j = 0; j < block; ++j) line[j][r] = gain * c[r * ldc + i + j] + bias;
    }
    for (int64_t j = 0; j < std::min(block, count - i); ++j)
      k.narrow(p.dtype, line[j], height,
               p.row(p.y, p.route.row(from + i + j), rows) + row * item_size(p.dtype));
  }
}

// Rows of the weight to a panel: as few panels as threads can share evenly.
int64_t panel_height(const Kernels& k, int64_t rows) {
  const int64_t share = at::divup(rows, at::get_num_threads());
  return std::min(panel_rows,
                  round_up(at::divup(share, at::divup(share, panel_rows)), k.tile_height));
}

template <class T>
void linear_panels(const Base& w, const Linear& p, int64_t from, int64_t count) {
  const Kernels& k = w.k;
  const int64_t rows = w.rows, cols = w.cols, threads = at::get_num_threads(),
                ld = step_of<T> + 2 * pad;
  const int64_t width = sizeof(T) == 2 && count <= 16 ? 16 : k.tile_width,
                panels = at::divup(count, width);
  const int64_t depth = whole<T>(cols), height = panel_height(k, rows), ldc = panels * width + pad;
  const Factor<T> x(panels * width * depth), panel(height * ld, threads), line(depth, threads);
  const Scratch sums(height * ldc, threads), scratch(w.scratch(step_of<T>), threads);
  const LowRank low(k, p, from, count);
  pack_right(k, p, cols, from, count, width, line, x.of(0));
  at::parallel_for(0, at::divup(rows, height), 1, [&](int64_t begin, int64_t end) {
    const Products<T> products;
    const int thread = at::get_thread_num();
    T* own = panel.of(thread);
    float* c = sums.of(thread);
    for (int64_t r0 = begin * height; r0 < std::min(rows, end * height); r0 += height) {
      const int64_t here = std::min(height, rows - r0);
      if (cols == 0) std::fill_n(c, here * ldc, 0.0f);
      for (int64_t k0 = 0; k0 < cols; k0 += step_of<T>) {
        const int64_t step = std::min(step_of<T>, cols - k0), padded = whole<T>(step);
        w.read(r0, here, k0, step, scratch.of(thread), own, ld);
        for (int64_t r = 0; step < padded && r < here; ++r)
          std::fill(own + r * ld + step, own + r * ld + padded, T{0});
        for (int64_t j = 0; j < panels; ++j)
          multiply(k, here, width, padded, own, ld, x.of(0) + (j * depth + k0) * width, width,
                   c + j * width, ldc, k0 > 0);
      }
      low.add(k, p, rows, r0, here, c, ldc);
      write_transposed(k, p, rows, r0, here, from, count, c, ldc);
    }
  });
}

// ---- dx = (gain dy) W + mask(U A) + add

// The left factor: [step of depth][count][ld].
template <class T>
void pack_left(const Kernels& k, const LinearBackward& p, int64_t rows, int64_t from, int64_t count,
               int64_t ld, T* to) {
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0; r < rows; r += step_of<T>) {
        const int64_t step = std::min(step_of<T>, rows - r);
        T* row = to + (r / step_of<T> * count + i) * ld;
        const char* dy = p.row(p.dy, p.route.row(from + i), rows) + r * item_size(p.dtype);
        load_row(k, p.dtype, dy, p.gain ? p.gain + r : nullptr, step, row);
        std::fill(row + step, row + whole<T>(step), T{0});
      }
  });
}

// The right factor of a step: to[depth][ld], rows row .. of columns col ..; in bf16 in pairs of
// rows. Missing columns of the last tile, and rows of the last pairs, are zero.
void read_right(const Base& w, int64_t row, int64_t depth, int64_t col, int64_t count,
                float* scratch, float*, float* to, int64_t ld) {
  w.read(row, depth, col, count, scratch, to, ld);
  for (int64_t r = 0; r < depth; ++r)
    std::fill(to + r * ld + count, to + r * ld + round_up(count, w.k.tile_width), 0.0f);
}

void read_right(const Base& w, int64_t row, int64_t depth, int64_t col, int64_t count,
                float* scratch, uint16_t* lines, uint16_t* to, int64_t ld) {
  const int64_t width = round_up(count, w.k.tile_width);
  for (int64_t r = 0; r < whole<uint16_t>(depth); r += 2, to += 2 * ld) {
    const int64_t there = std::clamp<int64_t>(depth - r, 0, 2);
    w.read(row + r, there, col, count, scratch, lines, most_cols);
    for (int64_t i = 0; i < 2; ++i)
      std::fill(lines + i * most_cols + (i < there ? count : 0), lines + i * most_cols + width,
                uint16_t{0});
    w.k.interleave(lines, lines + most_cols, width, to);
  }
}

// c[count, here] += mask(U A) in columns col .. , rows the positions from ..
void add_low_rank(const Kernels& k, const LinearBackward& p, int64_t cols, int64_t col,
                  int64_t here, int64_t from, int64_t count, float* a, float* c, int64_t ldc) {
  const int64_t width = round_up(here, k.tile_width);
  float u[16 * 64], product[16 * most_cols];
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
      const int64_t ld = p.threshold ? most_cols : ldc;
      for (int64_t r = 0; r < p.rank; r += 64) {
        const int64_t depth = std::min<int64_t>(64, p.rank - r);
        for (int64_t j = 0; j < height; ++j)
          std::copy_n(p.u + p.route.row(i + j) * p.rank + r, depth, u + j * 64);
        multiply(k, height, width, depth, u, 64, a + r * width, width, to, ld,
                 r > 0 || !p.threshold);
      }
      for (int64_t j = 0; p.threshold && j < height; ++j) {
        k.drop(p.seed, p.route.row(i + j), col, here, p.threshold, product + j * most_cols);
        for (int64_t q = 0; q < here; ++q)
          c[(i - from + j) * ldc + q] += product[j * most_cols + q];
      }
    }
  }
}

// Columns of the weight to a panel: long runs of its rows, but sums that stay in the cache, and
// work for every thread.
int64_t panel_width(const Kernels& k, int64_t cols, int64_t count) {
  const int64_t share = round_up(at::divup(cols, at::get_num_threads()), k.tile_width);
  return std::min(share, count <= 128 ? most_cols : 256);
}

template <class T>
void backward_panels(const Base& w, const LinearBackward& p, int64_t from, int64_t count) {
  const Kernels& k = w.k;
  const int64_t rows = w.rows, cols = w.cols, threads = at::get_num_threads();
  const int64_t panel_cols = panel_width(k, cols, count);
  const int64_t ld = step_of<T> + 2 * pad, ldw = panel_cols + pad, ldc = panel_cols + pad;
  const Factor<T> packed(at::divup(rows, step_of<T>) * count * ld),
      panel(step_of<T> * ldw, threads);
  const Factor<T> lines(2 * most_cols, threads);
  const Scratch sums(count * ldc, threads), scratch(w.scratch(panel_cols), threads);
  const Scratch a(std::max<int64_t>(1, p.rank) * panel_cols, threads);
  pack_left(k, p, rows, from, count, ld, packed.of(0));
  at::parallel_for(0, at::divup(cols, panel_cols), 1, [&](int64_t begin, int64_t end) {
    const Products<T> products;
    const int thread = at::get_thread_num();
    T* own = panel.of(thread);
    float* c = sums.of(thread);
    for (int64_t c0 = begin * panel_cols; c0 < std::min(cols, end * panel_cols); c0 += panel_cols) {
      const int64_t here = std::min(panel_cols, cols - c0), width = round_up(here, k.tile_width);
      if (rows == 0) std::fill_n(c, count * ldc, 0.0f);
      for (int64_t r0 = 0; r0 < rows; r0 += step_of<T>) {
        const int64_t step = std::min(step_of<T>, rows - r0);
        read_right(w, r0, step, c0, here, scratch.of(thread), lines.of(thread), own, ldw);
        multiply(k, count, width, whole<T>(step), packed.of(0) + r0 / step_of<T> * count * ld, ld,
                 own, ldw, c, ldc, r0 > 0);
      }
      if (p.rank) add_low_rank(k, p, cols, c0, here, from, count, a.of(thread), c, ldc);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = p.route.row(from + i), offset = c0 * item_size(p.dtype);
        if (p.add) {
          float more[most_cols];
          k.widen(p.dtype, p.row(p.add, row, cols) + offset, here, more);
          for (int64_t j = 0; j < here; ++j) c[i * ldc + j] += more[j];
        }
        k.narrow(p.dtype, c + i * ldc, here, p.row(p.dx, row, cols) + offset);
      }
    }
  });
}

}  // namespace

void linear(const Base& w, const Linear& p) {
  if (p.m <= 0 || w.rows == 0) return;
  const bool bf16 = multiplies_bf16(p.dtype);
  if (p.m <= (bf16 && w.dense() ? 5 : few))
    return linear_few(w, p);  // brgemm is ahead from six dense rows on
  for (int64_t i = 0; i < p.m; i += most_m) {
    const int64_t count = std::min(most_m, p.m - i);
    bf16 ? linear_panels<uint16_t>(w, p, i, count) : linear_panels<float>(w, p, i, count);
  }
}

void linear_backward(const Base& w, const LinearBackward& p) {
  if (w.cols == 0) return;
  for (int64_t i = 0; i < p.m; i += most_m) {
    const int64_t count = std::min(most_m, p.m - i);
    multiplies_bf16(p.dtype) ? backward_panels<uint16_t>(w, p, i, count)
                             : backward_panels<float>(w, p, i, count);
  }
}

}  // namespace pyfast::cpu
