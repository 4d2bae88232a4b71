// Products of a few rows of x. They are memory bound, so there is one pass over the weight.
#include <ATen/Parallel.h>

#include "cpu/linear/linear.h"

namespace pyfast::cpu {
namespace {

using FusedDot = decltype(NF4Kernels::fused_dot);

// Chooses the loop for one row of x and brings the row into the loop's layout. Null means that no
// fused loop takes the weight; then x is in fp32 as it is, and the weight's row is decoded.
FusedDot prepare_row(const FrozenWeight& w, const void* x, DType dtype, float* plain, float* to) {
  const NF4Weight* nf4 = w.nf4();
  const bool groups = nf4 && nf4->kernels.fused_dot && w.cols % kFusedGroup == 0 &&
                      nf4->view.blocksize % kFusedGroup == 0;
  w.k.widen(dtype, x, w.cols, groups ? plain : to);
  if (!groups) return nullptr;
  if (dtype == DType::bf16 && nf4->kernels.fixed_dot && nf4->code.fixed_exact &&
      nf4->kernels.arrange_fixed(nf4->code, plain, w.cols, to))
    return nf4->kernels.fixed_dot;
  nf4->kernels.arrange(plain, w.cols, to);
  return nf4->kernels.fused_dot;
}

// Computes sums[i] = W[row] . x[i]. Neighboring rows of x that share a loop are done together.
void dot_few_rows(const FrozenWeight& w, int64_t row, int64_t m, const FusedDot* loops,
                  const float* x, float* scratch, float* line, float* sums) {
  const int64_t ldx = arranged_size(w.cols);
  if (!loops[0]) {
    const DenseView* dense = w.dense();
    if (!dense) w.read(row, 1, 0, w.cols, scratch, line, w.cols);
    const void* values = dense ? static_cast<const void*>(dense->row(row)) : line;
    const DType dtype = dense ? dense->dtype : DType::f32;
    for (int64_t i = 0; i < m; ++i) sums[i] = w.k.dot(dtype, values, x + i * ldx, w.cols);
    return;
  }
  const PackedRun run = w.nf4()->run(row * w.cols, w.cols, scratch);
  for (int64_t i = 0, next; i < m; i = next) {
    for (next = i + 1; next < m && next < i + kFusedRows && loops[next] == loops[i];) ++next;
    loops[i](run, next - i, x + i * ldx, sums + i);
  }
}

// Returns gain (sum + b . s) + bias for row r of the weight.
float finish(const Kernels& k, const Linear& p, int64_t r, const float* b, const float* s,
             float sum) {
  if (b) sum += k.dot(DType::f32, b + r * p.rank, s, p.rank);
  return (p.gain ? p.gain[r] : 1) * sum + (p.bias ? p.bias[r] : 0);
}

}  // namespace

void linear_few_rows(const FrozenWeight& w, const Linear& p) {
  const int64_t rows = w.rows, cols = w.cols, m = p.m, ldx = arranged_size(cols),
                threads = at::get_num_threads();
  const Scratch x(m * ldx), out(m * rows), plain(cols), line(cols, threads),
      scratch(w.scratch(cols), threads);
  FusedDot loops[kFewRows];
  for (int64_t i = 0; i < m; ++i)
    loops[i] = prepare_row(w, p.row(p.x, i, cols), p.dtype, plain.of(0), x.of(0) + i * ldx);
  const float* b[kFewRows] = {};
  for (const Segment& s : p.route.segments)
    for (int64_t q = s.begin; p.rank && q < s.end; ++q)
      b[p.route.row(q)] = p.b + s.adapter * rows * p.rank;
  at::parallel_for(0, rows, grain_size(cols), [&](int64_t begin, int64_t end) {
    const int thread = at::get_thread_num();
    for (int64_t r = begin; r < end; ++r) {
      float sums[kFewRows];
      dot_few_rows(w, r, m, loops, x.of(0), scratch.of(thread), line.of(thread), sums);
      for (int64_t i = 0; i < m; ++i)
        out.of(0)[i * rows + r] = finish(w.k, p, r, b[i], p.s + i * p.rank, sums[i]);
    }
  });
  for (int64_t i = 0; i < m; ++i)
    w.k.narrow(p.dtype, out.of(0) + i * rows, rows, p.row(p.y, i, rows));
}

}  // namespace pyfast::cpu
