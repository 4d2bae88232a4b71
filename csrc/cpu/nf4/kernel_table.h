// The inner loops of NF4, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"
#include "cpu/nf4/nf4.h"

namespace pyfast::cpu {

// The 16 codes, and their bytes as planes: a 16-entry byte shuffle looks up one plane. `fixed` is
// code / unit as a 16-bit integer; `fixed_exact` says whether it is off by at most 2^-11 of every
// code.
struct Codebook {
  float value[16];
  uint8_t plane[4][16], fixed[2][16];
  float unit;
  bool fixed_exact;
};

// A run of `count` consecutive elements of a packed weight, from element `begin` on.
struct PackedRun {
  const Codebook* code;
  const uint8_t* packed;  // at element 0
  const float* scales;    // at the block of element `begin`
  int64_t begin, count;
  int block_shift;  // log2(blocksize)
};

struct NF4Kernels {
  // Quantizes `blocks` whole blocks of `blocksize` elements.
  void (*quantize)(DType, const void* from, int64_t blocks, int64_t blocksize,
                   const float* thresholds, const uint8_t* order, uint8_t* packed, float* absmax);
  void (*decode)(DType, const PackedRun&, void* to);

  // Decodes and multiplies in registers: y[i] = run . x[i] for i < m <= kFusedRows. A pointer is
  // null where there is no such loop. The run is whole groups of 64 elements, none across a block's
  // border. x is in the layout that `arrange` gives it, with arranged_size(count) floats a row. The
  // fixed loop is for bf16 x: it multiplies 16-bit integers (AVX2) or bf16 (AVX512-BF16), which is
  // exact enough for bf16. arrange_fixed returns false for rows that it cannot take.
  void (*fused_dot)(const PackedRun&, int64_t m, const float* x, float* y);
  void (*arrange)(const float* from, int64_t count, float* to);
  void (*fixed_dot)(const PackedRun&, int64_t m, const float* x, float* y);
  bool (*arrange_fixed)(const Codebook&, const float* from, int64_t count, float* to);
};

const NF4Kernels& nf4_kernels();  // those of isa()

constexpr int64_t kFusedGroup = 64, kFusedRows = 4;

inline int64_t arranged_size(int64_t count) { return count + count / kFusedGroup; }

const NF4Kernels& portable_nf4_kernels();
#if defined(__x86_64__)
const NF4Kernels& avx2_nf4_kernels();
void avx2_fixed_dot(const PackedRun&, int64_t m, const float* x, float* y);
bool avx2_arrange_fixed(const Codebook&, const float* from, int64_t count, float* to);
const NF4Kernels& avx512_nf4_kernels();
void avx512_bf16_fixed_dot(const PackedRun&, int64_t m, const float* x, float* y);
bool avx512_bf16_arrange_fixed(const Codebook&, const float* from, int64_t count, float* to);
#endif

inline uint8_t nibble(const uint8_t* packed, int64_t i) {
  return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
}

}  // namespace pyfast::cpu
