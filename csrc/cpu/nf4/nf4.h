// NF4 on the CPU: quantize and dequantize. The caller checks all arguments (ops/).
#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

// A packed weight of shape [rows, cols], borrowed. Element i of the flattened weight is nibble i of
// `packed` (high nibble first) and belongs to block i / blocksize. Blocks may straddle rows; the
// last may be short. The value is code[nibble] * scale(block), one fp32 product. If absmax is set,
//   scale(b) = absmax[b];
// otherwise, with two roundings and no FMA,
//   scale(b) = fp32(nested_code[absmax_code[b]] * nested_absmax[b / 256]) + offset.
struct NF4View {
  const uint8_t* packed;
  const float* code;           // [16]
  const float* absmax;         // [blocks], or null: nested
  const uint8_t* absmax_code;  // [blocks]
  const float* nested_absmax;  // [ceil(blocks / 256)]
  const float* nested_code;    // [256]
  float offset;
  int64_t rows, cols, blocksize;  // blocksize: a power of two, 32..4096
};

// Quantizes a weight to packed[ceil(numel / 2)] and absmax[ceil(numel / blocksize)]. The code of v
// is order[#{t in thresholds : x > t}] with
//   x = v * fp32(1 / max(absmax, 1e-38))  in a whole block,
//   x = v / max(absmax, 1e-38)            in a short last one, which also stores max(absmax,
// 1e-38).
// A missing last nibble is the code of 0. A non-finite element makes its block's absmax non-finite.
void nf4_quantize(const void* weight, DType dtype, int64_t numel, int64_t blocksize,
                  const float* thresholds, const uint8_t* order, uint8_t* packed, float* absmax);

// Quantizes the scales in blocks of 256: d = absmax - offset, nested_absmax = max |d|, code = #{t
// in thresholds[255] : d * fp32(1 / nested_absmax) > t}. In a block of zeros all codes are 0.
void nf4_quantize_scales(const float* absmax, int64_t blocks, float offset, const float* thresholds,
                         uint8_t* codes, float* nested_absmax);

// Writes the weight to out[rows * cols], each value rounded once.
void nf4_dequantize(const NF4View& weight, DType dtype, void* out);

}  // namespace pyfast::cpu
