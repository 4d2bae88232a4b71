#include "cpu/linear/lora.h"

#include <ATen/Parallel.h>

namespace pyfast::cpu {
namespace {

constexpr int64_t kDepthStep = 256;  // steps of the sum at a time
constexpr int64_t kStripCols = 128;  // columns of sum_outer_products at a time

// Packs an adapter's right factor to to[depth][width], times its scale and gain. The rank is padded
// to whole tiles.
void pack(const Kernels& k, const RankProjection& p, int64_t adapter, int64_t width, float* to) {
  const char* from =
      static_cast<const char*>(p.right) + adapter * p.depth * p.rank * item_size(p.right_dtype);
  at::parallel_for(0, at::divup(p.depth, kDepthStep), 4, [&](int64_t begin, int64_t end) {
    float line[kDepthStep];
    for (int64_t d = begin * kDepthStep; d < std::min(p.depth, end * kDepthStep); d += kDepthStep) {
      const int64_t step = std::min(kDepthStep, p.depth - d);
      std::fill_n(to + d * width, step * width, 0.0f);
      for (int64_t r = 0; p.transposed && r < p.rank; ++r) {
        k.widen(p.right_dtype, from + (r * p.depth + d) * item_size(p.right_dtype), step, line);
        for (int64_t i = 0; i < step; ++i) to[(d + i) * width + r] = line[i];
      }
      for (int64_t i = d; i < d + step; ++i) {
        if (!p.transposed)
          k.widen(p.right_dtype, from + i * p.rank * item_size(p.right_dtype), p.rank,
                  to + i * width);
        const float factor = p.scales[adapter] * (p.gain ? p.gain[i] : 1);
        for (int64_t r = 0; r < width; ++r) to[i * width + r] *= factor;
      }
    }
  });
}

}  // namespace

void project_to_rank(const RankProjection& p) {
  const Kernels& k = kernels();
  const bool is_narrow = p.rank <= k.tile_width / 2;
  const int64_t step_width = is_narrow ? k.tile_width / 2 : k.tile_width,
                width = round_up(p.rank, step_width);
  const auto tile = is_narrow ? k.narrow_tile : k.tile;
  const int64_t threads = at::get_num_threads();
  for (int64_t i = 0; i < p.m; ++i) std::fill_n(p.out + i * p.ldo, p.rank, 0.0f);
  const Scratch right(p.depth * width), x(k.tile_height * kDepthStep, threads),
      sums(k.tile_height * width, threads);
  for (const Segment& s : p.route.segments) {
    if (s.begin == s.end) continue;
    pack(k, p, s.adapter, width, right.of(0));
    const float* packed_right = right.of(0);
    const int64_t blocks = at::divup(s.end - s.begin, k.tile_height);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      float *x_block = x.of(at::get_thread_num()), *c = sums.of(at::get_thread_num());
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = s.begin + b * k.tile_height,
                      height = std::min(k.tile_height, s.end - first);
        for (int64_t d = 0; d < p.depth; d += kDepthStep) {
          const int64_t step = std::min(kDepthStep, p.depth - d);
          for (int64_t i = 0; i < height; ++i) {
            const int64_t row = p.route.row(first + i);
            k.widen(p.dtype, p.row(p.x, row, p.depth) + d * item_size(p.dtype), step,
                    x_block + i * kDepthStep);
            if (p.mask.threshold)
              k.drop(p.mask.seed, row, d, step, p.mask.threshold, x_block + i * kDepthStep);
          }
          for (int64_t j = 0; j < width; j += step_width)
            tile(height, step, x_block, kDepthStep, packed_right + d * width + j, width, c + j,
                 width, d > 0);
        }
        for (int64_t i = 0; p.depth && i < height; ++i)
          std::copy_n(c + i * width, p.rank, p.out + p.route.row(first + i) * p.ldo);
      }
    });
  }
}

namespace {

// Computes columns col .. col + here - 1 of sum_outer_products in one thread: rows in order, a step
// at a time.
class Strip {
 public:
  Strip(const OuterProductSums& p, float* rows, float* sums)
      : p_(p), k_(kernels()), rows_(rows), c_(sums) {}

  static int64_t floats() { return kDepthStep * kStripCols; }

  void run(int64_t col, int64_t here) {
    if (p_.sum) std::fill_n(p_.sum + col, here, 0.0f);
    if (p_.weighted) std::fill_n(p_.weighted + col, here, 0.0f);
    if (p_.out)
      for (int64_t i = 0; i < p_.adapters * p_.rank; ++i)
        std::fill_n(p_.out + i * p_.width + col, here, 0.0f);
    int64_t next = 0;
    for (const Segment& s : p_.route.segments) {
      sum_rest(next, s.begin, col, here);
      for (int64_t i = s.begin; i < s.end; i += kDepthStep) {
        const int64_t depth = std::min(kDepthStep, s.end - i);
        load(i, depth, col, here);
        if (p_.out) multiply(i, depth, i > s.begin);
      }
      if (p_.out && s.begin < s.end)
        for (int64_t r = 0; r < p_.rank; ++r)
          std::copy_n(c_ + r * kStripCols, here,
                      p_.out + (s.adapter * p_.rank + r) * p_.width + col);
      next = s.end;
    }
    sum_rest(next, p_.m, col, here);
  }

 private:
  // Adds rows begin .. end - 1, which have no adapter, to the sums over all rows.
  void sum_rest(int64_t begin, int64_t end, int64_t col, int64_t here) {
    for (int64_t i = begin; (p_.sum || p_.weighted) && i < end; i += kDepthStep)
      load(i, std::min(kDepthStep, end - i), col, here);
  }

  void load(int64_t first, int64_t count, int64_t col, int64_t here) {
    // Sums of these rows alone, since sums of sums have smaller errors.
    float sum[kStripCols] = {}, weighted[kStripCols] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = p_.route.row(first + i), offset = col * item_size(p_.dtype);
      float* to = rows_ + i * kStripCols;
      k_.widen(p_.dtype, p_.row(p_.right, row, p_.width) + offset, here, to);
      std::fill(to + here, to + kStripCols, 0.0f);
      for (int64_t j = 0; p_.sum && j < kStripCols; ++j) sum[j] += to[j];
      if (p_.weighted) {
        float weight[kStripCols];
        k_.widen(p_.dtype, p_.row(p_.weight, row, p_.width) + offset, here, weight);
        for (int64_t j = 0; j < here; ++j) weighted[j] += to[j] * weight[j];
      }
      if (p_.mask.threshold) k_.drop(p_.mask.seed, row, col, here, p_.mask.threshold, to);
    }
    for (int64_t j = 0; p_.sum && j < here; ++j) p_.sum[col + j] += sum[j];
    for (int64_t j = 0; p_.weighted && j < here; ++j) p_.weighted[col + j] += weighted[j];
  }

  // Computes c[rank][kStripCols] (+)= left[rows first ..]^T rows.
  void multiply(int64_t first, int64_t depth, bool add) {
    float left[16 * kDepthStep];
    for (int64_t r = 0; r < p_.rank; r += k_.tile_height) {
      const int64_t height = std::min(k_.tile_height, p_.rank - r);
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t q = 0; q < height; ++q)
          left[q * kDepthStep + i] = p_.left[p_.route.row(first + i) * p_.ldl + r + q];
      for (int64_t j = 0; j < kStripCols; j += k_.tile_width)
        k_.tile(height, depth, left, kDepthStep, rows_ + j, kStripCols, c_ + r * kStripCols + j,
                kStripCols, add);
    }
  }

  const OuterProductSums& p_;
  const Kernels& k_;
  float *rows_, *c_;
};

}  // namespace

void sum_outer_products(const OuterProductSums& p) {
  const int64_t threads = at::get_num_threads();
  const Scratch rows(Strip::floats(), threads),
      sums(std::max<int64_t>(1, p.rank) * kStripCols, threads);
  at::parallel_for(0, at::divup(p.width, kStripCols), 1, [&](int64_t begin, int64_t end) {
    Strip strip(p, rows.of(at::get_thread_num()), sums.of(at::get_thread_num()));
    for (int64_t j = begin * kStripCols; j < std::min(p.width, end * kStripCols); j += kStripCols)
      strip.run(j, std::min(kStripCols, p.width - j));
  });
}

void row_squares(const FrozenWeight& w, float* to) {
  const int64_t threads = at::get_num_threads();
  const Scratch line(w.cols, threads), scratch(w.scratch(w.cols), threads);
  at::parallel_for(0, w.rows, 16, [&](int64_t begin, int64_t end) {
    float* row = line.of(at::get_thread_num());
    for (int64_t r = begin; r < end; ++r) {
      w.read(r, 1, 0, w.cols, scratch.of(at::get_thread_num()), row, w.cols);
      to[r] = w.k.dot(DType::f32, row, row, w.cols);
    }
  });
}

}  // namespace pyfast::cpu
