// A weight ready to be decoded, and scratch memory: what the drivers share.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "cpu/nf4/kernel_table.h"

namespace pyfast::cpu {

inline int64_t up_to(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Floats of one thread each, seen by torch's memory profiler: allocated before the threads start.
class Scratch {
 public:
  explicit Scratch(int64_t each, int64_t threads = 1)
      : each_(up_to(each, 16)),
        data_(c10::GetCPUAllocator()->allocate(size_t(each_ * threads) * sizeof(float))) {}
  float* of(int64_t thread) const { return static_cast<float*>(data_.get()) + thread * each_; }

 private:
  int64_t each_;
  c10::DataPtr data_;
};

const Kernels& kernels();     // of isa()
bool multiplies_bf16(DType);  // whether torch's brgemm does here, by AVX512-BF16 or AMX
Codebook codebook(const float* code);
int log2(int64_t power);

// to[count] = scale(first) .. scale(first + count - 1)
void decode_scales(const NF4View&, int64_t first, int64_t count, float* to);

struct Weight {
  NF4View view;
  Codebook code;
  int shift;
  const Kernels& k;

  explicit Weight(const NF4View& view)
      : view(view), code(codebook(view.code)), shift(log2(view.blocksize)), k(kernels()) {}

  int64_t most_scales(int64_t count) const { return (count >> shift) + 2; }

  Run run(int64_t begin, int64_t count, float* scales) const {
    if (count)
      decode_scales(view, begin >> shift, ((begin + count - 1) >> shift) - (begin >> shift) + 1,
                    scales);
    return {&code, view.packed, scales, begin, count, shift};
  }
};

}  // namespace pyfast::cpu
