#include "cpu/linear/lora.h"

#include <ATen/Parallel.h>

namespace pyfast::cpu {
namespace {

constexpr int64_t depth_step = 256;  // of the sum, at a time
constexpr int64_t strip = 128;       // columns of `outer` at a time

// to[depth][width] = an adapter's right factor with all that multiplies it, its rank padded to
// whole tiles.
void pack(const Kernels& k, const Thin& p, int64_t adapter, int64_t width, float* to) {
  const char* from =
      static_cast<const char*>(p.right) + adapter * p.depth * p.rank * item_size(p.right_dtype);
  at::parallel_for(0, at::divup(p.depth, depth_step), 4, [&](int64_t begin, int64_t end) {
    float line[depth_step];
    for (int64_t d = begin * depth_step; d < std::min(p.depth, end * depth_step); d += depth_step) {
      const int64_t step = std::min(depth_step, p.depth - d);
      std::fill_n(to + d * width, step * width, 0.0f);
      for (int64_t r = 0; p.transposed && r < p.rank; ++r) {
        k.widen(p.right_dtype, from + (r * p.depth + d) * item_size(p.right_dtype), step, line);
        for (int64_t i = 0; i < step; ++i) to[(d + i) * width + r] = line[i];
      }
      for (int64_t i = d; i < d + step; ++i) {
        if (!p.transposed)
          k.widen(p.right_dtype, from + i * p.rank * item_size(p.right_dtype), p.rank,
                  to + i * width);
        const float by = p.scales[adapter] * (p.gain ? p.gain[i] : 1);
        for (int64_t r = 0; r < width; ++r) to[i * width + r] *= by;
      }
    }
  });
}

}  // namespace

void thin(const Thin& p) {
  const Kernels& k = kernels();
  const bool narrow = p.rank <= k.tile_width / 2;
  const int64_t step_width = narrow ? k.tile_width / 2 : k.tile_width,
                width = round_up(p.rank, step_width);
  const auto tile = narrow ? k.narrow_tile : k.tile;
  const int64_t threads = at::get_num_threads();
  for (int64_t i = 0; i < p.m; ++i) std::fill_n(p.out + i * p.ldo, p.rank, 0.0f);
  const Scratch right(p.depth * width), x(k.tile_height * depth_step, threads),
      sums(k.tile_height * width, threads);
  for (const Segment& s : p.route.segments) {
    if (s.begin == s.end) continue;
    pack(k, p, s.adapter, width, right.of(0));
    const float* own_right = right.of(0);
    const int64_t blocks = at::divup(s.end - s.begin, k.tile_height);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      float *own = x.of(at::get_thread_num()), *c = sums.of(at::get_thread_num());
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = s.begin + b * k.tile_height,
                      height = std::min(k.tile_height, s.end - first);
        for (int64_t d = 0; d < p.depth; d += depth_step) {
          const int64_t step = std::min(depth_step, p.depth - d);
          for (int64_t i = 0; i < height; ++i) {
            const int64_t row = p.route.row(first + i);
            k.widen(p.dtype, p.row(p.x, row, p.depth) + d * item_size(p.dtype), step,
                    own + i * depth_step);
            if (p.mask.threshold)
              k.drop(p.mask.seed, row, d, step, p.mask.threshold, own + i * depth_step);
          }
          for (int64_t j = 0; j < width; j += step_width)
            tile(height, step, own, depth_step, own_right + d * width + j, width, c + j, width,
                 d > 0);
        }
        for (int64_t i = 0; p.depth && i < height; ++i)
          std::copy_n(c + i * width, p.rank, p.out + p.route.row(first + i) * p.ldo);
      }
    });
  }
}

namespace {

// Columns col .. col + here - 1 of `outer`, for one thread: rows in order, a step at a time.
class Strip {
 public:
  Strip(const Outer& p, float* rows, float* sums) : p_(p), k_(kernels()), rows_(rows), c_(sums) {}

  static int64_t floats() { return depth_step * strip; }

  void run(int64_t col, int64_t here) {
    if (p_.sum) std::fill_n(p_.sum + col, here, 0.0f);
    if (p_.weighted) std::fill_n(p_.weighted + col, here, 0.0f);
    if (p_.out)
      for (int64_t i = 0; i < p_.adapters * p_.rank; ++i)
        std::fill_n(p_.out + i * p_.width + col, here, 0.0f);
    int64_t next = 0;
    for (const Segment& s : p_.route.segments) {
      rest(next, s.begin, col, here);
      for (int64_t i = s.begin; i < s.end; i += depth_step) {
        const int64_t depth = std::min(depth_step, s.end - i);
        load(i, depth, col, here);
        if (p_.out) multiply(i, depth, i > s.begin);
      }
      if (p_.out && s.begin < s.end)
        for (int64_t r = 0; r < p_.rank; ++r)
          std::copy_n(c_ + r * strip, here, p_.out + (s.adapter * p_.rank + r) * p_.width + col);
      next = s.end;
    }
    rest(next, p_.m, col, here);
  }

 private:
  // Rows without an adapter count for the sums only.
  void rest(int64_t begin, int64_t end, int64_t col, int64_t here) {
    for (int64_t i = begin; (p_.sum || p_.weighted) && i < end; i += depth_step)
      load(i, std::min(depth_step, end - i), col, here);
  }

  void load(int64_t first, int64_t count, int64_t col, int64_t here) {
    float sum[strip] = {}, weighted[strip] = {};  // of these rows alone: sums of sums err less
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = p_.route.row(first + i), offset = col * item_size(p_.dtype);
      float* to = rows_ + i * strip;
      k_.widen(p_.dtype, p_.row(p_.right, row, p_.width) + offset, here, to);
      std::fill(to + here, to + strip, 0.0f);
      for (int64_t j = 0; p_.sum && j < strip; ++j) sum[j] += to[j];
      if (p_.weighted) {
        float weight[strip];
        k_.widen(p_.dtype, p_.row(p_.weight, row, p_.width) + offset, here, weight);
        for (int64_t j = 0; j < here; ++j) weighted[j] += to[j] * weight[j];
      }
      if (p_.mask.threshold) k_.drop(p_.mask.seed, row, col, here, p_.mask.threshold, to);
    }
    for (int64_t j = 0; p_.sum && j < here; ++j) p_.sum[col + j] += sum[j];
    for (int64_t j = 0; p_.weighted && j < here; ++j) p_.weighted[col + j] += weighted[j];
  }

  // c[rank][strip] (+)= left[rows first ..]^T rows
  void multiply(int64_t first, int64_t depth, bool add) {
    float left[16 * depth_step];
    for (int64_t r = 0; r < p_.rank; r += k_.tile_height) {
      const int64_t height = std::min(k_.tile_height, p_.rank - r);
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t q = 0; q < height; ++q)
          left[q * depth_step + i] = p_.left[p_.route.row(first + i) * p_.ldl + r + q];
      for (int64_t j = 0; j < strip; j += k_.tile_width)
        k_.tile(height, depth, left, depth_step, rows_ + j, strip, c_ + r * strip + j, strip, add);
    }
  }

  const Outer& p_;
  const Kernels& k_;
  float *rows_, *c_;
};

}  // namespace

void outer(const Outer& p) {
  const int64_t threads = at::get_num_threads();
  const Scratch rows(Strip::floats(), threads), sums(std::max<int64_t>(1, p.rank) * strip, threads);
  at::parallel_for(0, at::divup(p.width, strip), 1, [&](int64_t begin, int64_t end) {
    Strip own(p, rows.of(at::get_thread_num()), sums.of(at::get_thread_num()));
    for (int64_t j = begin * strip; j < std::min(p.width, end * strip); j += strip)
      own.run(j, std::min(strip, p.width - j));
  });
}

void row_squares(const Base& w, float* to) {
  const int64_t threads = at::get_num_threads();
  const Scratch line(w.cols, threads), scratch(w.scratch(w.cols), threads);
  at::parallel_for(0, w.rows, 16, [&](int64_t begin, int64_t end) {
    float* own = line.of(at::get_thread_num());
    for (int64_t r = begin; r < end; ++r) {
      w.read(r, 1, 0, w.cols, scratch.of(at::get_thread_num()), own, w.cols);
      to[r] = w.k.dot(DType::f32, own, own, w.cols);
    }
  });
}

}  // namespace pyfast::cpu
