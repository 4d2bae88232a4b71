// A weight ready to be decoded, and scratch memory: what the drivers share.
#pragma once

#include "cpu/nf4/kernel_table.h"

namespace pyfast::cpu {

Codebook codebook(const float* code);
int log2(int64_t power);

// to[count] = scale(first) .. scale(first + count - 1)
void decode_scales(const NF4View&, int64_t first, int64_t count, float* to);

struct Weight {
  NF4View view;
  Codebook code;
  int shift;
  const NF4Kernels& kernels;

  explicit Weight(const NF4View& view)
      : view(view),
        code(codebook(view.code)),
        shift(log2(view.blocksize)),
        kernels(nf4_kernels()) {}

  int64_t most_scales(int64_t count) const { return (count >> shift) + 2; }

  Run run(int64_t begin, int64_t count, float* scales) const {
    if (count)
      decode_scales(view, begin >> shift, ((begin + count - 1) >> shift) - (begin >> shift) + 1,
                    scales);
    return {&code, view.packed, scales, begin, count, shift};
  }
};

}  // namespace pyfast::cpu
