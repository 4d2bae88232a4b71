#include "cpu/reversible/step.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/common/kernels.h"

#define LOOPS "cpu/reversible/step_loops.h"
#include "cpu/common/each_isa.h"

namespace pyfast::cpu {

namespace {

constexpr int64_t kBlock = 1024;  // floats, so that what is widened stays in L1

struct Loops {
  decltype(&portable::add_plain) plain;
  decltype(&portable::add_grid) grid;
  decltype(&portable::add_fixed) fixed;
};

Loops loops() { return {BEST(add_plain), BEST(add_grid), BEST(add_fixed)}; }

const float* floats_of(DType dtype, const void* from, int64_t first, int64_t count, float* buffer) {
  const char* address = static_cast<const char*>(from) + first * item_size(dtype);
  if (dtype == DType::f32) return reinterpret_cast<const float*>(address);
  kernels().widen(dtype, address, count, buffer);
  return buffer;
}

void add_plain(const Loops& loop, DType dtype, void* to, int64_t first, int64_t count,
               const float* from, float sign) {
  char* address = static_cast<char*>(to) + first * item_size(dtype);
  if (dtype == DType::f32) return loop.plain(reinterpret_cast<float*>(address), from, count, sign);
  float sums[kBlock];
  kernels().widen(dtype, address, count, sums);
  loop.plain(sums, from, count, sign);
  kernels().narrow(dtype, sums, count, address);
}

// Does `count` values from `first` on. Returns the worst error among them.
StepError step(const ReversibleStep& p, const Loops& loop, int64_t first, int64_t count) {
  float buffer[kBlock];
  const float* out = floats_of(p.out_dtype, p.out, first, count, buffer);
  const float sign = p.subtract ? -1.0f : 1.0f;
  bool has_left = false;
  switch (p.stream_type) {
    case StreamType::plain: add_plain(loop, p.dtype, p.stream, first, count, out, sign); break;
    case StreamType::grid:
      has_left = loop.grid(static_cast<float*>(p.stream) + first, out, count, sign, p.scale);
      break;
    case StreamType::fixed:
      has_left = loop.fixed(static_cast<int32_t*>(p.stream) + first, out, count, sign, p.scale);
      break;
  }
  if (!has_left) return kNone;
  const bool finite = std::all_of(out, out + count, [](float x) { return std::isfinite(x); });
  return finite ? kOverflow : kNotFinite;
}

}  // namespace

StepError reversible_step(const ReversibleStep& p) {
  static const Loops loop = loops();
  std::atomic<int> worst{kNone};
  at::parallel_for(0, at::divup(p.count, kBlock), 16, [&](int64_t begin, int64_t end) {
    int error = kNone;
    for (int64_t i = begin; i < end; ++i)
      error =
          std::max<int>(error, step(p, loop, i * kBlock, std::min(kBlock, p.count - i * kBlock)));
    for (int before = worst; before < error && !worst.compare_exchange_weak(before, error);) {
    }
  });
  return StepError(worst.load());
}

}  // namespace pyfast::cpu
