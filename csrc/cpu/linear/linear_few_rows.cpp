// Few rows of x: one pass over the weight, memory bound.
#include <ATen/Parallel.h>

#include "cpu/linear/linear.h"

namespace pyfast::cpu {
namespace {

using FusedDot = decltype(NF4Kernels::fused_dot);

// The loop to use for one row of x, now in the loop's layout; null: the weight's row, and x as it
// is in fp32.
FusedDot prepare_row(const Base& w, const void* x, DType dtype, float* plain, float* to) {
  const Weight* nf4 = w.nf4();
  const bool groups = nf4 && nf4->kernels.fused_dot && w.cols % fused_group == 0 &&
                      nf4->view.blocksize % fused_group == 0;
  w.k.widen(dtype, x, w.cols, groups ? plain : to);
  if (!groups) return nullptr;
  if (dtype == DType::bf16 && nf4->kernels.fixed_dot && nf4->code.fixed_exact &&
      nf4->kernels.arrange_fixed(nf4->code, plain, w.cols, to))
    return nf4->kernels.fixed_dot;
  nf4->kernels.arrange(plain, w.cols, to);
  return nf4->kernels.fused_dot;
}

// sums[i] = W[row] . x[i]; rows of x that share a loop go together.
void dot_few(const Base& w, int64_t row, int64_t m, const FusedDot* loops, const float* x,
             float* scratch, float* line, float* sums) {
  const int64_t ldx = arranged_size(w.cols);
  if (!loops[0]) {
    const DenseView* dense = w.dense();
    if (!dense) w.read(row, 1, 0, w.cols, scratch, line, w.cols);
    const void* values = dense ? static_cast<const void*>(dense->row(row)) : line;
    const DType dtype = dense ? dense->dtype : DType::f32;
    for (int64_t i = 0; i < m; ++i) sums[i] = w.k.dot(dtype, values, x + i * ldx, w.cols);
    return;
  }
  const Run run = w.nf4()->run(row * w.cols, w.cols, scratch);
  for (int64_t i = 0, next; i < m; i = next) {
    for (next = i + 1; next < m && next < i + fused_rows && loops[next] == loops[i];) ++next;
    loops[i](run, next - i, x + i * ldx, sums + i);
  }
}

// gain (sum + b . s) + bias of row r of the weight
float finish(const Kernels& k, const Linear& p, int64_t r, const float* b, const float* s,
             float sum) {
  if (b) sum += k.dot(DType::f32, b + r * p.rank, s, p.rank);
  return (p.gain ? p.gain[r] : 1) * sum + (p.bias ? p.bias[r] : 0);
}

}  // namespace

void linear_few(const Base& w, const Linear& p) {
  const int64_t rows = w.rows, cols = w.cols, m = p.m, ldx = arranged_size(cols),
                threads = at::get_num_threads();
  const Scratch x(m * ldx), out(m * rows), plain(cols), line(cols, threads),
      scratch(w.scratch(cols), threads);
  FusedDot loops[few];
  for (int64_t i = 0; i < m; ++i)
    loops[i] = prepare_row(w, p.row(p.x, i, cols), p.dtype, plain.of(0), x.of(0) + i * ldx);
  const float* b[few] = {};
  for (const Segment& s : p.route.segments)
    for (int64_t q = s.begin; p.rank && q < s.end; ++q)
      b[p.route.row(q)] = p.b + s.adapter * rows * p.rank;
  at::parallel_for(0, rows, grain_size(cols), [&](int64_t begin, int64_t end) {
    const int thread = at::get_thread_num();
    for (int64_t r = begin; r < end; ++r) {
      float sums[few];
      dot_few(w, r, m, loops, x.of(0), scratch.of(thread), line.of(thread), sums);
      for (int64_t i = 0; i < m; ++i)
        out.of(0)[i * rows + r] = finish(w.k, p, r, b[i], p.s + i * p.rank, sums[i]);
    }
  });
  for (int64_t i = 0; i < m; ++i)
    w.k.narrow(p.dtype, out.of(0) + i * rows, rows, p.row(p.y, i, rows));
}

}  // namespace pyfast::cpu
