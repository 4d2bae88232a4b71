// A packed weight that is ready to be decoded.
#pragma once

#include "cpu/nf4/kernel_table.h"

namespace pyfast::cpu {

Codebook make_codebook(const float* code);
int log2_of_power(int64_t power);

// Writes scale(first) .. scale(first + count - 1) to `to`.
void decode_scales(const NF4View&, int64_t first, int64_t count, float* to);

struct NF4Weight {
  NF4View view;
  Codebook code;
  int shift;
  const NF4Kernels& kernels;

  explicit NF4Weight(const NF4View& view)
      : view(view),
        code(make_codebook(view.code)),
        shift(log2_of_power(view.blocksize)),
        kernels(nf4_kernels()) {}

  // Returns room for the scales of any `count` consecutive elements.
  int64_t max_scales(int64_t count) const { return (count >> shift) + 2; }

  // Returns elements begin .. begin + count - 1; their scales are decoded to `scales`.
  PackedRun run(int64_t begin, int64_t count, float* scales) const {
    if (count)
      decode_scales(view, begin >> shift, ((begin + count - 1) >> shift) - (begin >> shift) + 1,
                    scales);
    return {&code, view.packed, scales, begin, count, shift};
  }
};

}  // namespace pyfast::cpu
