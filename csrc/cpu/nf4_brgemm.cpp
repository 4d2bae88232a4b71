// Many rows of x in bf16 on a machine with AMX: panels of the weight in bf16, packed as torch's brgemm wants its right
// factor (VNNI): b[depth / 2][width][2], two consecutive steps of the sum side by side.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include "isa.h"
#include "nf4_weight.h"

namespace pyfast::cpu {
namespace {

namespace blas = at::native::cpublas;

constexpr int64_t width = 32, most_depth = 512;

// from[width][depth] -> VNNI. A pair of steps is one 32-bit word on both sides.
void pack_rows(const uint16_t* from, int64_t depth, uint16_t* to) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t n = 0; n < width; ++n) std::memcpy(to + (k * width + 2 * n), from + n * depth + k, 4);
}

// from[depth][width] -> VNNI.
void pack_columns(const uint16_t* from, int64_t depth, uint16_t* to) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < width; ++n) to[k / 2 * 2 * width + 2 * n + k % 2] = from[k * width + n];
}

struct Panels {  // of each thread: decoded, packed, the product in fp32, and scales
  Scratch decoded, packed, product, scales;

  Panels(const Weight& w, int64_t m)
      : decoded(width * most_depth / 2, at::get_num_threads()),
        packed(width * most_depth / 2, at::get_num_threads()),
        product(m * width, at::get_num_threads()),
        scales(w.most_scales(most_depth), at::get_num_threads()) {}
  uint16_t* own_decoded() const { return reinterpret_cast<uint16_t*>(decoded.of(at::get_thread_num())); }
  uint16_t* own_packed() const { return reinterpret_cast<uint16_t*>(packed.of(at::get_thread_num())); }
  float* own_product() const { return product.of(at::get_thread_num()); }

  // product[m, width] (+)= a[m, depth] @ packed
  void multiply(int64_t m, int64_t depth, const uint16_t* a, int64_t lda, bool add) const {
    blas::brgemm(m, width, depth, lda, width, width, add, reinterpret_cast<const at::BFloat16*>(a),
                 reinterpret_cast<const at::BFloat16*>(own_packed()), own_product());
  }
  // decoded[rows][ld] = a rectangle of the weight
  void decode(const Weight& w, int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t ld) const {
    float* own_scales = scales.of(at::get_thread_num());
    for (int64_t r = 0; r < rows; ++r)
      w.k.decode(DType::bf16, w.run((row + r) * w.view.cols + col, cols, own_scales), own_decoded() + r * ld);
  }
};

}  // namespace

bool has_brgemm(DType dtype, int64_t depth) {
  constexpr int64_t tile_depth = 32;
  return dtype == DType::bf16 && isa() == Isa::amx && depth && depth % tile_depth == 0 &&
         blas::could_pack(at::kBFloat16);
}

void linear_brgemm(const Weight& w, const void* x, int64_t m, const void* bias, void* y) {
  const int64_t rows = w.view.rows, cols = w.view.cols;
  const Panels panels(w, m);
  const auto add = static_cast<const uint16_t*>(bias);
  at::parallel_for(0, at::divup(rows, width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r0 = begin * width; r0 < std::min(rows, end * width); r0 += width) {
      const int64_t here = std::min(width, rows - r0);
      for (int64_t k0 = 0; k0 < cols; k0 += most_depth) {
        const int64_t depth = std::min(most_depth, cols - k0);
        panels.decode(w, r0, here, k0, depth, depth);
        std::fill(panels.own_decoded() + here * depth, panels.own_decoded() + width * depth, uint16_t{0});
        pack_rows(panels.own_decoded(), depth, panels.own_packed());
        panels.multiply(m, depth, static_cast<const uint16_t*>(x) + k0, cols, k0 > 0);
      }
      float own_bias[width] = {};
      if (bias) w.k.widen(DType::bf16, add + r0, here, own_bias);
      for (int64_t i = 0; i < m; ++i) {
        float* row = panels.own_product() + i * width;
        for (int64_t r = 0; r < here; ++r) row[r] += own_bias[r];
        w.k.narrow(DType::bf16, row, here, static_cast<uint16_t*>(y) + i * rows + r0);
      }
    }
    blas::brgemm_release();
  });
}

void backward_brgemm(const Weight& w, const void* dy, int64_t m, void* dx) {
  const int64_t rows = w.view.rows, cols = w.view.cols;
  const Panels panels(w, m);
  at::parallel_for(0, at::divup(cols, width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c0 = begin * width; c0 < std::min(cols, end * width); c0 += width) {
      const int64_t here = std::min(width, cols - c0);
      if (here < width) std::fill_n(panels.own_decoded(), width * most_depth, uint16_t{0});
      for (int64_t r0 = 0; r0 < rows; r0 += most_depth) {
        const int64_t depth = std::min(most_depth, rows - r0);
        panels.decode(w, r0, depth, c0, here, width);
        pack_columns(panels.own_decoded(), depth, panels.own_packed());
        panels.multiply(m, depth, static_cast<const uint16_t*>(dy) + r0, rows, r0 > 0);
      }
      for (int64_t i = 0; i < m; ++i)
        w.k.narrow(DType::bf16, panels.own_product() + i * width, here, static_cast<uint16_t*>(dx) + i * cols + c0);
    }
    blas::brgemm_release();
  });
}

}  // namespace pyfast::cpu
