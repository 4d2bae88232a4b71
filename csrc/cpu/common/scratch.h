// Scratch memory of the threads, and the sizes of what they share.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>

namespace pyfast::cpu {

// Returns x, rounded up to a multiple.
inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Returns how many items of `work_each` operations are worth a thread, for at::parallel_for.
inline int64_t grain_size(int64_t work_each) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_each));
}

// Holds `each` floats for each thread. They are allocated through torch, so that its memory
// profiler sees them, and before the threads start.
class Scratch {
 public:
  explicit Scratch(int64_t each, int64_t threads = 1)
      : each_(round_up(each, 16)),
        data_(c10::GetCPUAllocator()->allocate(size_t(each_ * threads) * sizeof(float))) {}
  float* of(int64_t thread) const { return static_cast<float*>(data_.get()) + thread * each_; }

 private:
  int64_t each_;
  c10::DataPtr data_;
};

}  // namespace pyfast::cpu
