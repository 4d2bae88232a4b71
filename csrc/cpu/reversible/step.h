// The arithmetic of reversible streams: raw pointers in and out.
#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

// plain: floats. grid: float32 multiples of 1 / scale, below 2^24 of them. fixed: int32 in units of
// 1 / scale, which wrap around.
enum class Stream { plain, grid, fixed };

// stream += out or stream -= out, out rounded to the stream's units
struct ReversibleStep {
  Stream kind;
  DType dtype, out_dtype;  // fixed: dtype is not read
  void* stream;
  const void* out;
  int64_t count;
  float scale;
  bool subtract;
};

enum Trouble { none = 0, overflow = 1, not_finite = 2 };  // what a flag holds: the worst

Trouble reversible_step(const ReversibleStep&);

}  // namespace pyfast::cpu
