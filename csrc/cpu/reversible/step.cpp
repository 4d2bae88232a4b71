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

constexpr int64_t block = 1024;  // floats: what is widened stays in L1

struct Loops {
  decltype(&portable::add_plain) plain;
  decltype(&portable::add_grid) grid;
  decltype(&portable::add_fixed) fixed;
};

Loops loops() { return {BEST(add_plain), BEST(add_grid), BEST(add_fixed)}; }

const float* floats_of(DType dtype, const void* from, int64_t first, int64_t count, float* room) {
  const char* here = static_cast<const char*>(from) + first * item_size(dtype);
  if (dtype == DType::f32) return reinterpret_cast<const float*>(here);
  kernels().widen(dtype, here, count, room);
  return room;
}

void add_plain(const Loops& loop, DType dtype, void* to, int64_t first, int64_t count,
               const float* from, float sign) {
  char* here = static_cast<char*>(to) + first * item_size(dtype);
  if (dtype == DType::f32) return loop.plain(reinterpret_cast<float*>(here), from, count, sign);
  float sums[block];
  kernels().widen(dtype, here, count, sums);
  loop.plain(sums, from, count, sign);
  kernels().narrow(dtype, sums, count, here);
}

// Of `count` values from `first` on.
Trouble step(const ReversibleStep& p, const Loops& loop, int64_t first, int64_t count) {
  float room[block];
  const float* out = floats_of(p.out_dtype, p.out, first, count, room);
  const float sign = p.subtract ? -1.0f : 1.0f;
  bool left = false;
  switch (p.kind) {
    case Stream::plain: add_plain(loop, p.dtype, p.stream, first, count, out, sign); break;
    case Stream::grid:
      left = loop.grid(static_cast<float*>(p.stream) + first, out, count, sign, p.scale);
      break;
    case Stream::fixed:
      left = loop.fixed(static_cast<int32_t*>(p.stream) + first, out, count, sign, p.scale);
      break;
  }
  if (!left) return none;
  const bool finite = std::all_of(out, out + count, [](float x) { return std::isfinite(x); });
  return finite ? overflow : not_finite;
}

}  // namespace

Trouble reversible_step(const ReversibleStep& p) {
  static const Loops loop = loops();
  std::atomic<int> worst{none};
  at::parallel_for(0, at::divup(p.count, block), 16, [&](int64_t begin, int64_t end) {
    int found = none;
    for (int64_t i = begin; i < end; ++i)
      found = std::max<int>(found, step(p, loop, i * block, std::min(block, p.count - i * block)));
    for (int before = worst; before < found && !worst.compare_exchange_weak(before, found);) {
    }
  });
  return Trouble(worst.load());
}

}  // namespace pyfast::cpu
