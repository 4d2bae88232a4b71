// The bottleneck adapter. Rows are done in blocks whose hidden values stay in a thread's cache;
// weights are packed once a call.
#include "cpu/adapter/adapter.h"

#include <vector>

#include "cpu/adapter/activation.h"
#include "cpu/adapter/products.h"

namespace pyfast::cpu {
namespace {

constexpr int64_t kMaxBlockRows = 64;  // of a block
constexpr int64_t kChunkCols = 512;    // columns of a result at a time
constexpr int64_t kRowPadding = 16;    // because rows a power of two apart would share cache sets

int64_t hidden_ld(const AdapterView& w) {
  return round_up(w.bottleneck, kColumnUnit) + kRowPadding;
}

template <class T>
T* as(const Scratch& scratch, int64_t thread) {
  return reinterpret_cast<T*>(scratch.of(thread));
}

// Calls visit(first row, rows, thread) for blocks of rows that threads share as evenly as possible.
template <class T, class F>
void each_block(int64_t m, const F& visit) {
  const int64_t unit = kIsBF16<T> ? 32 : kernels().tile_height, most = kMaxBlockRows / unit * unit;
  at::parallel_for(0, at::divup(m, unit), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * unit, last = std::min(m, end * unit); row < last; row += most)
      visit(row, std::min(most, last - row), at::get_thread_num());
    if constexpr (kIsBF16<T>) at::native::cpublas::brgemm_release();
  });
}

// Computes c[rows, b's columns] += from[first : first + rows] b. `staged` is room for rows that
// need to be cast.
template <class T>
void multiply_rows(Values from, int64_t depth, int64_t first, int64_t rows, const Packed<T>& b,
                   int64_t cols, T* staged, float* c, int64_t ldc) {
  constexpr int64_t lda = kDepthStep<T> + kRowPadding;
  if (from.dtype == kDTypeOf<T>)
    return b.multiply(static_cast<const T*>(from.data) + first * depth, depth, rows, 0, depth, 0,
                      cols, c, ldc, true);
  for (int64_t k = 0; k < depth; k += kDepthStep<T>) {
    const int64_t steps = std::min(kDepthStep<T>, depth - k);
    for (int64_t i = 0; i < rows; ++i)
      convert(from, (first + i) * depth + k, steps, staged + i * lda);
    b.multiply(staged, lda, rows, k, steps, 0, cols, c, ldc, true);
  }
}

constexpr int64_t kStagedSize = kMaxBlockRows * (kMaxDepthStep + kRowPadding);

// Computes z[rows, bottleneck] = x down^T + down_bias, a block at a time.
template <class T>
class Down {
 public:
  Down(Values x, const AdapterView& w)
      : x_(x),
        w_(w),
        weight_(w.in, w.bottleneck),
        bias_(w.bottleneck),
        staged_(kStagedSize, at::get_num_threads()) {
    weight_.pack_transposed_in_parallel(w.down);
    std::fill_n(bias_.of(0), w.bottleneck, 0.0f);
    if (w.down_bias.data)
      kernels().widen(w.down_bias.dtype, w.down_bias.data, w.bottleneck, bias_.of(0));
  }
  void project(int64_t first, int64_t rows, int thread, float* z) const {
    const int64_t ld = hidden_ld(w_);
    for (int64_t i = 0; i < rows; ++i) std::copy_n(bias_.of(0), w_.bottleneck, z + i * ld);
    multiply_rows(x_, w_.in, first, rows, weight_, w_.bottleneck, as<T>(staged_, thread), z, ld);
  }
  T* staged(int thread) const { return as<T>(staged_, thread); }

 private:
  Values x_;
  const AdapterView& w_;
  Packed<T> weight_;
  Scratch bias_, staged_;
};

// Casts a row of hidden values to T, as a left factor that is zero beyond the bottleneck.
template <class T>
void left_factor(float* row, int64_t count, int64_t ld, T* to) {
  std::fill(row + count, row + ld, 0.0f);
  if constexpr (kIsBF16<T>)
    kernels().narrow(DType::bf16, row, ld, to);
  else
    std::copy_n(row, ld, to);
}

// Computes out[first : first + rows] = start + left b, a chunk of columns at a time. start(row,
// column, count, c) fills a row.
template <class T, class F>
void write_rows(const T* left, int64_t ld, int64_t depth, int64_t first, int64_t rows,
                const Packed<T>& b, int64_t cols, float* c, DType dtype, void* out,
                const F& start) {
  constexpr int64_t ldc = kChunkCols + kRowPadding;
  for (int64_t n = 0; n < cols; n += kChunkCols) {
    const int64_t here = std::min(kChunkCols, cols - n);
    for (int64_t i = 0; i < rows; ++i) start(first + i, n, here, c + i * ldc);
    b.multiply(left, ld, rows, 0, depth, n, here, c, ldc, true);
    for (int64_t i = 0; i < rows; ++i)
      kernels().narrow(dtype, c + i * ldc, here,
                       static_cast<char*>(out) + ((first + i) * cols + n) * item_size(dtype));
  }
}

// Computes to = scaling * up_bias.
void scaled_bias(const AdapterView& w, float* to) {
  std::fill_n(to, w.out, 0.0f);
  if (w.up_bias.data) kernels().widen(w.up_bias.dtype, w.up_bias.data, w.out, to);
  for (int64_t i = 0; i < w.out; ++i) to[i] *= w.scaling;
}

template <class T>
void forward(Values x, int64_t m, const AdapterView& w, Values residual, void* y) {
  const int64_t threads = at::get_num_threads(), ld = hidden_ld(w);
  const Down<T> down(x, w);
  Packed<T> up(w.bottleneck, w.out);
  up.pack_transposed_in_parallel(w.up);
  const Scratch bias(w.out), hidden(kMaxBlockRows * ld, threads), left(kMaxBlockRows * ld, threads);
  const Scratch sums(kMaxBlockRows * (kChunkCols + kRowPadding), threads);
  scaled_bias(w, bias.of(0));
  each_block<T>(m, [&](int64_t first, int64_t rows, int thread) {
    float* z = hidden.of(thread);
    T* h = as<T>(left, thread);
    down.project(first, rows, thread, z);
    for (int64_t i = 0; i < rows; ++i) {
      activate(w.activation, z + i * ld, w.bottleneck, w.scaling, z + i * ld);
      left_factor(z + i * ld, w.bottleneck, ld, h + i * ld);
    }
    const auto start = [&](int64_t row, int64_t n, int64_t count, float* c) {
      kernels().widen(residual.dtype, address_of(residual, row * w.out + n), count, c);
      if (w.up_bias.data)
        for (int64_t i = 0; i < count; ++i) c[i] += bias.of(0)[n + i];
    };
    write_rows(h, ld, w.bottleneck, first, rows, up, w.out, sums.of(thread), residual.dtype, y,
               start);
  });
}

// Calls use(i, r, product) with the products of each row r of the weight and each of m vectors.
// Threads share the rows.
template <class F>
void dot_rows(Values weight, int64_t rows, int64_t depth, int64_t m, const float* vectors,
              const F& use) {
  const Scratch row_floats(depth, at::get_num_threads());
  at::parallel_for(0, rows, grain_size(depth), [&](int64_t begin, int64_t end) {
    float* row = row_floats.of(at::get_thread_num());
    for (int64_t r = begin; r < end; ++r) {
      kernels().widen(weight.dtype, address_of(weight, r * depth), depth, row);
      for (int64_t i = 0; i < m; ++i)
        use(i, r, kernels().dot(DType::f32, row, vectors + i * depth, depth));
    }
  });
}

void forward_few_rows(Values x, int64_t m, const AdapterView& w, Values residual, void* y) {
  const Kernels& k = kernels();
  const Scratch x_floats(m * w.in), hidden(m * w.bottleneck), bias(std::max(w.bottleneck, w.out)),
      sums(m * w.out);
  float *z = hidden.of(0), *out = sums.of(0);
  k.widen(x.dtype, x.data, m * w.in, x_floats.of(0));
  std::fill_n(bias.of(0), w.bottleneck, 0.0f);
  if (w.down_bias.data) k.widen(w.down_bias.dtype, w.down_bias.data, w.bottleneck, bias.of(0));
  dot_rows(w.down, w.bottleneck, w.in, m, x_floats.of(0),
           [&](int64_t i, int64_t r, float sum) { z[i * w.bottleneck + r] = sum + bias.of(0)[r]; });
  activate(w.activation, z, m * w.bottleneck, w.scaling, z);
  scaled_bias(w, bias.of(0));
  k.widen(residual.dtype, residual.data, m * w.out, out);
  dot_rows(w.up, w.out, w.bottleneck, m, z,
           [&](int64_t i, int64_t r, float sum) { out[i * w.out + r] += sum + bias.of(0)[r]; });
  k.narrow(residual.dtype, out, m * w.out, y);
}

// ---- backward

// Computes to[cols] = scaling * the sums of a matrix's columns.
void column_sums(Values from, int64_t m, int64_t cols, float scaling, float* to) {
  at::parallel_for(0, at::divup(cols, kChunkCols), 1, [&](int64_t begin, int64_t end) {
    float row[kChunkCols], part[kChunkCols], sums[kChunkCols];
    for (int64_t n = begin * kChunkCols; n < std::min(cols, end * kChunkCols); n += kChunkCols) {
      const int64_t here = std::min(kChunkCols, cols - n);
      std::fill_n(sums, kChunkCols, 0.0f);
      // Sums of sums, so that roundings do not pile up.
      for (int64_t first = 0; first < m; first += kMaxBlockRows) {
        std::fill_n(part, kChunkCols, 0.0f);
        for (int64_t i = first; i < std::min(m, first + kMaxBlockRows); ++i) {
          convert(from, i * cols + n, here, row);
          for (int64_t j = 0; j < here; ++j) part[j] += row[j];
        }
        for (int64_t j = 0; j < here; ++j) sums[j] += part[j];
      }
      for (int64_t j = 0; j < here; ++j) to[n + j] = scaling * sums[j];
    }
  });
}

// Hidden values of all rows, transposed: the left factor of a weight's gradient. An additional row
// of ones sums the right factor's columns in the same product.
template <class T>
class Transposed {
 public:
  Transposed(int64_t m, int64_t bottleneck, bool ones)
      : m_(m),
        bottleneck_(bottleneck),
        rows_(bottleneck + ones),
        ld_(round_up(m, 32) + 2 * kRowPadding),
        memory_(rows_ * ld_) {
    for (int64_t j = 0; j < rows_; ++j) std::fill(row(j) + m, row(j) + ld_, T(0));
    if (ones) std::fill_n(row(bottleneck), m, T(kIsBF16<T> ? to_bf16(1) : 1));
  }
  T* row(int64_t j) const { return as<T>(memory_, 0) + j * ld_; }
  void set_column(int64_t i, const T* hidden) const {
    for (int64_t j = 0; j < bottleneck_; ++j) row(j)[i] = hidden[j];
  }

  // Calls write(column, columns, c, ldc) with pieces c[rows, columns] of this * right[:, column
  // ...]. Threads share the columns, so the order of a sum is that of the rows.
  template <class F>
  void multiply(Values right, int64_t cols, const F& write) const {
    const int64_t unit = 64, ldc = kChunkCols + kRowPadding, threads = at::get_num_threads();
    const Scratch sums(rows_ * ldc, threads);
    std::vector<Packed<T>> packed;
    for (int64_t i = 0; i < threads; ++i) packed.emplace_back(kDepthStep<T>, kChunkCols);
    at::parallel_for(0, at::divup(cols, unit), 1, [&](int64_t begin, int64_t end) {
      const int thread = at::get_thread_num();
      for (int64_t n = begin * unit, last = std::min(cols, end * unit); n < last; n += kChunkCols) {
        const int64_t here = std::min(kChunkCols, last - n);
        add_up(right, cols, n, here, packed[size_t(thread)], sums.of(thread), ldc);
        write(n, here, sums.of(thread), ldc);
      }
      if constexpr (kIsBF16<T>) at::native::cpublas::brgemm_release();
    });
  }

  // Computes to[bottleneck], the sums over all rows.
  void sums(float* to) const {
    at::parallel_for(0, bottleneck_, 8, [&](int64_t begin, int64_t end) {
      float row_floats[kMaxDepthStep];
      for (int64_t j = begin; j < end; ++j) {
        float sum = 0;
        for (int64_t i = 0; i < m_; i += kMaxDepthStep) {
          const int64_t here = std::min(kMaxDepthStep, m_ - i);
          kernels().widen(kDTypeOf<T>, row(j) + i, here, row_floats);
          float part = 0;
          for (int64_t n = 0; n < here; ++n) part += row_floats[n];
          sum += part;
        }
        to[j] = sum;
      }
    });
  }

 private:
  void add_up(Values right, int64_t cols, int64_t n, int64_t here, Packed<T>& b, float* c,
              int64_t ldc) const {
    for (int64_t k = 0; k == 0 || k < m_; k += kDepthStep<T>) {
      const int64_t steps = std::min(kDepthStep<T>, m_ - k);
      b.pack_rows(right, cols, k, n, steps, here);
      b.multiply(row(0) + k, ld_, rows_, 0, steps, 0, here, c, ldc, k > 0);
    }
  }

  int64_t m_, bottleneck_, rows_, ld_;
  Scratch memory_;
};

// Computes dx, and the hidden values that the weights' gradients are products of.
template <class T>
void backward_hidden(Values dy, Values x, int64_t m, const AdapterView& w, bool residual_is_x,
                     void* dx, const Transposed<T>* h, const Transposed<T>* dz) {
  const int64_t threads = at::get_num_threads(), ld = hidden_ld(w), b = w.bottleneck;
  const Down<T> down(x, w);
  Packed<T> up(w.out, dx || dz ? b : 0), down_rows(b, dx ? w.in : 0);
  if (dx || dz) up.pack_rows_in_parallel(w.up);
  if (dx) down_rows.pack_rows_in_parallel(w.down);
  const Scratch hidden(kMaxBlockRows * ld, threads), d_hidden(kMaxBlockRows * ld, threads),
      lefts(kMaxBlockRows * ld, threads);
  const Scratch lines(ld, threads), sums(kMaxBlockRows * (kChunkCols + kRowPadding), threads);
  const auto start = [&](int64_t row, int64_t n, int64_t count, float* c) {
    if (residual_is_x)
      kernels().widen(dy.dtype, address_of(dy, row * w.out + n), count, c);
    else
      std::fill_n(c, count, 0.0f);
  };
  each_block<T>(m, [&](int64_t first, int64_t rows, int thread) {
    float *z = hidden.of(thread), *d = d_hidden.of(thread);
    T *left = as<T>(lefts, thread), *line = as<T>(lines, thread);
    down.project(first, rows, thread, z);
    std::fill_n(d, rows * ld, 0.0f);
    if (dx || dz) multiply_rows(dy, w.out, first, rows, up, b, down.staged(thread), d, ld);
    for (int64_t i = 0; i < rows; ++i) {
      chain(w.activation, z + i * ld, d + i * ld, b, w.scaling, d + i * ld);
      left_factor(d + i * ld, b, ld, left + i * ld);
      if (dz) dz->set_column(first + i, left + i * ld);
      if (!h) continue;
      activate(w.activation, z + i * ld, b, w.scaling, z + i * ld);
      left_factor(z + i * ld, b, ld, line);
      h->set_column(first + i, line);
    }
    if (dx)
      write_rows(left, ld, b, first, rows, down_rows, w.in, sums.of(thread), x.dtype, dx, start);
  });
}

template <class T>
void backward(Values dy, Values x, int64_t m, const AdapterView& w, bool residual_is_x,
              const AdapterGradients& to) {
  const int64_t b = w.bottleneck;
  const bool keep_h = to.up, keep_dz = to.down || to.down_bias;
  const Transposed<T> h(m, keep_h ? b : 0, keep_h && to.up_bias), dz(m, keep_dz ? b : 0, false);
  if (to.x || keep_h || keep_dz)
    backward_hidden<T>(dy, x, m, w, residual_is_x, to.x, keep_h ? &h : nullptr,
                       keep_dz ? &dz : nullptr);
  if (to.down)
    dz.multiply(x, w.in, [&](int64_t n, int64_t count, const float* c, int64_t ldc) {
      for (int64_t j = 0; j < b; ++j)
        kernels().narrow(w.down.dtype, c + j * ldc, count,
                         static_cast<char*>(to.down) + (j * w.in + n) * item_size(w.down.dtype));
    });
  if (to.up)
    h.multiply(dy, w.out, [&](int64_t n, int64_t count, const float* c, int64_t ldc) {
      float row[kMaxPanelWidth];
      if (to.up_bias)
        for (int64_t i = 0; i < count; ++i) to.up_bias[n + i] = w.scaling * c[b * ldc + i];
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < b; j += kMaxPanelWidth) {
          const int64_t here = std::min(kMaxPanelWidth, b - j);
          for (int64_t l = 0; l < here; ++l) row[l] = c[(j + l) * ldc + i];
          kernels().narrow(w.up.dtype, row, here,
                           static_cast<char*>(to.up) + ((n + i) * b + j) * item_size(w.up.dtype));
        }
    });
  if (to.down_bias) dz.sums(to.down_bias);
  if (to.up_bias && !to.up) column_sums(dy, m, w.out, w.scaling, to.up_bias);
}

// Returns whether the products are done in bf16.
bool in_bf16(DType dtype, const AdapterView& w) {
  const bool has_whole_units =
      w.in && w.out && w.in % kDepthUnit<uint16_t> == 0 && w.out % kDepthUnit<uint16_t> == 0;
  return has_whole_units && multiplies_bf16(dtype);
}

}  // namespace

void adapter(Values x, int64_t m, const AdapterView& w, Values residual, void* y) {
  if (m <= 0 || w.out == 0) return;
  const bool bf16 = in_bf16(x.dtype, w);
  // For so few rows packing the weights costs more than it saves.
  if (m <= (bf16 ? 4 : 8)) return forward_few_rows(x, m, w, residual, y);
  bf16 ? forward<uint16_t>(x, m, w, residual, y) : forward<float>(x, m, w, residual, y);
}

void adapter_backward(Values dy, Values x, int64_t m, const AdapterView& w, bool residual_is_x,
                      const AdapterGradients& to) {
  in_bf16(x.dtype, w) ? backward<uint16_t>(dy, x, m, w, residual_is_x, to)
                      : backward<float>(dy, x, m, w, residual_is_x, to);
}

}  // namespace pyfast::cpu
