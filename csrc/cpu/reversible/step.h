// The arithmetic of reversible streams.
#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

// plain: floats. grid: float32 multiples of 1 / scale, less than 2^24 of them. fixed: int32 in
// units of 1 / scale, which wrap around.
enum class StreamType { plain, grid, fixed };

// stream += out, or stream -= out. out is rounded to the stream's units.
struct ReversibleStep {
  StreamType stream_type;
  DType dtype, out_dtype;  // dtype is not read for `fixed`
  void* stream;
  const void* out;
  int64_t count;
  float scale;
  bool subtract;
};

// What went wrong in a step; a flag holds the largest of them.
enum StepError { kNone = 0, kOverflow = 1, kNotFinite = 2 };

StepError reversible_step(const ReversibleStep&);

}  // namespace pyfast::cpu
