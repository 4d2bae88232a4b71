// The driver: threads, panels of decoded weight, and the choice of path.
#include "nf4.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "nf4_weight.h"

namespace pyfast::cpu {
const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = isa() >= Isa::avx512 ? avx512_kernels()
                                 : isa() >= Isa::avx2 ? avx2_kernels()
                                                      : portable_kernels();
  return chosen;
#else
  return portable_kernels();
#endif
}

Codebook codebook(const float* code) {
  Codebook book;
  for (int n = 0; n < 16; ++n) {
    book.value[n] = code[n];
    for (int p = 0; p < 4; ++p) book.plane[p][n] = uint8_t(bits_of(code[n]) >> 8 * p);
  }
  float largest = 0;
  for (int n = 0; n < 16; ++n) largest = std::max(largest, std::fabs(code[n]));
  book.unit = largest / 32640;  // 192 * 170: FP4's codes are multiples of 1 / 192, and exact
  book.fixed_exact = largest > 0;
  for (int n = 0; n < 16; ++n) {
    const long fixed = largest > 0 ? std::lrint(code[n] / book.unit) : 0;
    for (int p = 0; p < 2; ++p) book.fixed[p][n] = uint8_t(fixed >> 8 * p);
    book.fixed_exact &= std::fabs(fixed * book.unit - code[n]) <= std::fabs(code[n]) / 2048;
  }
  return book;
}

int log2(int64_t power) {
  int shift = 0;
  while (int64_t{1} << shift < power) ++shift;
  return shift;
}

// The product must be rounded before the sum: no contraction to an FMA.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
void decode_scales(const NF4View& w, int64_t first, int64_t count, float* to) {
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif
  if (w.absmax) {
    std::copy_n(w.absmax + first, count, to);
    return;
  }
  for (int64_t b = first, end = first + count; b < end;) {
    const int64_t stop = std::min(end, (b | 255) + 1);
    const float by = w.nested_absmax[b / 256];
    for (; b < stop; ++b) {
      const float product = w.nested_code[w.absmax_code[b]] * by;
      *to++ = product + w.offset;
    }
  }
}

namespace {

int64_t grain(int64_t work_each) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_each)); }

// ---- y = x W^T, few rows of x: one pass over the packed weight, memory bound.

constexpr int64_t few = 8;

using FusedDot = decltype(Kernels::fused_dot);

// The loop to use for one row of x, now in the loop's layout; null: decode the weight's row, and x as it is in fp32.
FusedDot prepare_row(const Weight& w, const void* x, DType dtype, float* plain, float* to) {
  const int64_t cols = w.view.cols;
  const bool groups = w.k.fused_dot && cols % fused_group == 0 && w.view.blocksize % fused_group == 0;
  w.k.widen(dtype, x, cols, groups ? plain : to);
  if (!groups) return nullptr;
  if (dtype == DType::bf16 && w.k.fixed_dot && w.code.fixed_exact && w.k.arrange_fixed(w.code, plain, cols, to))
    return w.k.fixed_dot;
  w.k.arrange(plain, cols, to);
  return w.k.fused_dot;
}

// sums[i] = run . x[i], rows of x that share a loop together.
void dot_few(const Weight& w, const Run& run, int64_t m, const FusedDot* loops, const float* x, float* decoded,
             float* sums) {
  const int64_t ldx = arranged_size(run.count);
  if (!loops[0]) {
    w.k.decode(DType::f32, run, decoded);
    for (int64_t i = 0; i < m; ++i) sums[i] = w.k.dot(decoded, x + i * ldx, run.count);
    return;
  }
  for (int64_t i = 0, next; i < m; i = next) {
    for (next = i + 1; next < m && next < i + fused_rows && loops[next] == loops[i];) ++next;
    loops[i](run, next - i, x + i * ldx, sums + i);
  }
}

void linear_few(const Weight& w, const void* x, DType dtype, int64_t m, const void* bias, void* y) {
  const int64_t rows = w.view.rows, cols = w.view.cols, ldx = arranged_size(cols);
  const Scratch prepared(m * ldx), out(m * rows), plain(std::max(cols, rows));
  const Scratch row(cols, at::get_num_threads()), scales(w.most_scales(cols), at::get_num_threads());
  FusedDot loops[few];
  for (int64_t i = 0; i < m; ++i)
    loops[i] = prepare_row(w, static_cast<const char*>(x) + i * cols * item_size(dtype), dtype, plain.of(0),
                           prepared.of(0) + i * ldx);
  at::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    const int thread = at::get_thread_num();
    for (int64_t r = begin; r < end; ++r) {
      float sums[few];
      dot_few(w, w.run(r * cols, cols, scales.of(thread)), m, loops, prepared.of(0), row.of(thread), sums);
      for (int64_t i = 0; i < m; ++i) out.of(0)[i * rows + r] = sums[i];
    }
  });
  if (bias) w.k.widen(dtype, bias, rows, plain.of(0));
  for (int64_t i = 0; i < m; ++i) {
    float* sums = out.of(0) + i * rows;
    if (bias)
      for (int64_t r = 0; r < rows; ++r) sums[r] += plain.of(0)[r];
    w.k.narrow(dtype, sums, rows, static_cast<char*>(y) + i * rows * item_size(dtype));
  }
}

// ---- Many rows: panels of the weight are decoded into a thread's cache and multiplied tile by tile.

constexpr int64_t depth_step = 128;            // of the sum, at a time: a panel of the other factor stays in L1
constexpr int64_t panel_ld = depth_step + 16;  // rows a power of two apart would share cache sets
constexpr int64_t panel_rows = 192, panel_cols = 256, most_m = 256;

// x[m, cols] as fp32 panels [m / width][cols][width]; missing rows are zero.
void pack_panels(const Kernels& k, const void* x, DType dtype, int64_t m, int64_t cols, const Scratch& rows,
                 float* to) {
  const int64_t width = k.tile_width, panels = up_to(m, width) / width;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    float* row = rows.of(at::get_thread_num());
    for (int64_t i = begin * width; i < end * width; ++i) {
      float* column = to + i / width * cols * width + i % width;
      if (i < m) k.widen(dtype, static_cast<const char*>(x) + i * cols * item_size(dtype), cols, row);
      for (int64_t c = 0; c < cols; ++c) column[c * width] = i < m ? row[c] : 0.0f;
    }
  });
}

// c[height, ...] (+)= one panel of decoded rows times all panels of x.
void multiply_panels(const Kernels& k, int64_t height, int64_t depth, const float* panel, const float* x,
                     int64_t x_panel, int64_t x_panels, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < x_panels; ++j)
    for (int64_t i = 0; i < height; i += k.tile_height)
      k.tile(std::min(k.tile_height, height - i), depth, panel + i * panel_ld, panel_ld, x + j * x_panel, k.tile_width,
             c + i * ldc + j * k.tile_width, ldc, add);
}

// y[m, first .. first + height - 1] = transpose(c[height, m]) + bias
void write_transposed(const Kernels& k, const float* c, int64_t ldc, int64_t m, int64_t height, DType dtype,
                      const void* bias, void* y, int64_t ldy) {
  float row[panel_rows], add[panel_rows] = {};
  if (bias) k.widen(dtype, bias, height, add);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < height; ++r) row[r] = c[r * ldc + i] + add[r];
    k.narrow(dtype, row, height, static_cast<char*>(y) + i * ldy * item_size(dtype));
  }
}

void linear_panels(const Weight& w, const void* x, DType dtype, int64_t m, const void* bias, void* y) {
  const Kernels& k = w.k;
  const int64_t rows = w.view.rows, cols = w.view.cols, threads = at::get_num_threads();
  const int64_t panels = up_to(m, k.tile_width) / k.tile_width, ldc = panels * k.tile_width;
  const int64_t share = up_to(at::divup(rows, threads), k.tile_height), height = std::min(panel_rows, share);
  const Scratch packed_x(ldc * cols), panel(panel_rows * panel_ld, threads), sums(height * ldc, threads);
  const Scratch scales(w.most_scales(depth_step), threads), line(cols, threads);
  pack_panels(k, x, dtype, m, cols, line, packed_x.of(0));
  at::parallel_for(0, at::divup(rows, height), 1, [&](int64_t begin, int64_t end) {
    const int thread = at::get_thread_num();
    float *own = panel.of(thread), *c = sums.of(thread);
    for (int64_t r0 = begin * height; r0 < std::min(rows, end * height); r0 += height) {
      const int64_t here = std::min(height, rows - r0);
      for (int64_t k0 = 0; k0 == 0 || k0 < cols; k0 += depth_step) {
        const int64_t depth = std::min(depth_step, cols - k0);
        w.decode_panel(r0, here, k0, depth, scales.of(thread), own, panel_ld);
        multiply_panels(k, here, depth, own, packed_x.of(0) + k0 * k.tile_width, cols * k.tile_width, panels, c, ldc,
                        k0 > 0);
      }
      const int64_t item = item_size(dtype);
      write_transposed(k, c, ldc, m, here, dtype, bias ? static_cast<const char*>(bias) + r0 * item : nullptr,
                       static_cast<char*>(y) + r0 * item, rows);
    }
  });
}

// ---- dx = dy W

// dy[m, rows] as fp32 panels [rows / depth_step][m][panel_ld].
void pack_depths(const Kernels& k, const void* dy, DType dtype, int64_t m, int64_t rows, float* to) {
  at::parallel_for(0, m, grain(rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0; r < rows; r += depth_step)
        k.widen(dtype, static_cast<const char*>(dy) + (i * rows + r) * item_size(dtype), std::min(depth_step, rows - r),
                to + (r / depth_step * m + i) * panel_ld);
  });
}

void backward_panels(const Weight& w, const void* dy, DType dtype, int64_t m, void* dx) {
  const Kernels& k = w.k;
  const int64_t rows = w.view.rows, cols = w.view.cols, threads = at::get_num_threads(), ld = panel_cols + 16;
  const Scratch packed_dy(at::divup(rows, depth_step) * m * panel_ld), scales(w.most_scales(panel_cols), threads);
  const Scratch panel(depth_step * ld, threads), sums(m * panel_cols, threads);
  pack_depths(k, dy, dtype, m, rows, packed_dy.of(0));
  at::parallel_for(0, at::divup(cols, panel_cols), 1, [&](int64_t begin, int64_t end) {
    const int thread = at::get_thread_num();
    float *own = panel.of(thread), *c = sums.of(thread);
    for (int64_t c0 = begin * panel_cols; c0 < std::min(cols, end * panel_cols); c0 += panel_cols) {
      const int64_t here = std::min(panel_cols, cols - c0);
      for (int64_t r0 = 0; r0 == 0 || r0 < rows; r0 += depth_step) {
        const int64_t depth = std::min(depth_step, rows - r0);
        w.decode_panel(r0, depth, c0, here, scales.of(thread), own, ld);
        for (int64_t r = 0; here % k.tile_width && r < depth; ++r)
          std::fill(own + r * ld + here, own + r * ld + up_to(here, k.tile_width), 0.0f);
        const float* a = packed_dy.of(0) + r0 / depth_step * m * panel_ld;
        for (int64_t j = 0; j < here; j += k.tile_width)
          for (int64_t i = 0; i < m; i += k.tile_height)
            k.tile(std::min(k.tile_height, m - i), depth, a + i * panel_ld, panel_ld, own + j, ld,
                   c + i * panel_cols + j, panel_cols, r0 > 0);
      }
      for (int64_t i = 0; i < m; ++i)
        k.narrow(dtype, c + i * panel_cols, here, static_cast<char*>(dx) + (i * cols + c0) * item_size(dtype));
    }
  });
}

// The last block when it is short: a division instead of a reciprocal, and a floor under the stored absmax.
void quantize_short(const Kernels& k, const void* from, DType dtype, int64_t count, const float* thresholds,
                    const uint8_t* order, uint8_t* packed, float* absmax) {
  const Scratch scratch(count + 1);
  float* x = scratch.of(0);
  k.widen(dtype, from, count, x);
  uint32_t max = 0;  // as bits: a NaN is above all numbers
  for (int64_t i = 0; i < count; ++i) max = std::max(max, bits_of(x[i]) & 0x7fffffff);
  *absmax = float_of(max) < 1e-38f ? 1e-38f : float_of(max);
  x[count] = 0;
  for (int64_t i = 0; i < count; i += 2) {
    uint8_t codes[2];
    for (int half = 0; half < 2; ++half) {
      const float v = i + half < count ? x[i + half] / *absmax : 0.0f;
      codes[half] = order[std::count_if(thresholds, thresholds + 15, [v](float t) { return v > t; })];
    }
    packed[i / 2] = uint8_t(codes[0] << 4 | codes[1]);
  }
}

}  // namespace

void nf4_quantize(const void* weight, DType dtype, int64_t numel, int64_t blocksize, const float* thresholds,
                  const uint8_t* order, uint8_t* packed, float* absmax) {
  const Kernels& k = kernels();
  const auto bytes = static_cast<const char*>(weight);
  const int64_t whole = numel / blocksize;
  at::parallel_for(0, whole, grain(blocksize), [&](int64_t begin, int64_t end) {
    k.quantize(dtype, bytes + begin * blocksize * item_size(dtype), end - begin, blocksize, thresholds, order,
               packed + begin * blocksize / 2, absmax + begin);
  });
  const int64_t done = whole * blocksize;
  if (done < numel)
    quantize_short(k, bytes + done * item_size(dtype), dtype, numel - done, thresholds, order, packed + done / 2,
                   absmax + whole);
}

void nf4_quantize_scales(const float* absmax, int64_t blocks, float offset, const float* thresholds, uint8_t* codes,
                         float* nested_absmax) {
  at::parallel_for(0, at::divup(blocks, 256), 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * 256, last = std::min(blocks, first + 256);
      uint32_t max = 0;
      for (int64_t b = first; b < last; ++b) max = std::max(max, bits_of(absmax[b] - offset) & 0x7fffffff);
      nested_absmax[g] = float_of(max);
      const float inverse = 1.0f / nested_absmax[g];
      for (int64_t b = first; b < last; ++b) {
        const float d = (absmax[b] - offset) * inverse;
        int rank = 0;
        for (int step = 128; step; step /= 2) rank += d > thresholds[rank + step - 1] ? step : 0;
        codes[b] = uint8_t(rank);
      }
    }
  });
}

void nf4_dequantize(const NF4View& view, DType dtype, void* out) {
  const Weight w(view);
  constexpr int64_t step = 4096;  // even: a step starts at a byte
  const int64_t numel = view.rows * view.cols;
  const Scratch scales(w.most_scales(step), at::get_num_threads());
  at::parallel_for(0, at::divup(numel, step), 8, [&](int64_t begin, int64_t end) {
    float* own = scales.of(at::get_thread_num());
    for (int64_t i = begin * step; i < std::min(numel, end * step); i += step)
      w.k.decode(dtype, w.run(i, std::min(step, numel - i), own), static_cast<char*>(out) + i * item_size(dtype));
  });
}

void nf4_linear(const void* x, DType dtype, int64_t m, const NF4View& view, const void* bias, void* y) {
  const Weight w(view);
  if (m <= 0 || view.rows == 0) return;
  if (m <= few) return linear_few(w, x, dtype, m, bias, y);
  const bool brgemm = has_brgemm(dtype, view.cols);
  for (int64_t i = 0; i < m; i += most_m) {
    const int64_t here = std::min(most_m, m - i);
    const void* xi = static_cast<const char*>(x) + i * view.cols * item_size(dtype);
    void* yi = static_cast<char*>(y) + i * view.rows * item_size(dtype);
    brgemm ? linear_brgemm(w, xi, here, bias, yi) : linear_panels(w, xi, dtype, here, bias, yi);
  }
}

void nf4_linear_backward(const void* dy, DType dtype, int64_t m, const NF4View& view, void* dx) {
  const Weight w(view);
  const bool brgemm = has_brgemm(dtype, view.rows);
  for (int64_t i = 0; i < m; i += most_m) {
    const int64_t here = std::min(most_m, m - i);
    const void* dyi = static_cast<const char*>(dy) + i * view.rows * item_size(dtype);
    void* dxi = static_cast<char*>(dx) + i * view.cols * item_size(dtype);
    brgemm ? backward_brgemm(w, dyi, here, dxi) : backward_panels(w, dyi, dtype, here, dxi);
  }
}

}  // namespace pyfast::cpu
