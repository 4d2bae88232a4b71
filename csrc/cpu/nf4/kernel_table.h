// The inner loops of NF4, once for each instruction set: what nf4.cpp needs of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/nf4/nf4.h"

namespace pyfast::cpu {

// The 16 codes, and the same as planes of bytes: a 16-entry byte shuffle looks up one plane.
// `fixed` is code / unit as a 16-bit integer; `fixed_exact` says that this is off by no more than
// 2^-11 of any code.
struct Codebook {
  float value[16];
  uint8_t plane[4][16], fixed[2][16];
  float unit;
  bool fixed_exact;
};

// `count` consecutive elements of a packed weight, from element `begin` on.
struct Run {
  const Codebook* code;
  const uint8_t* packed;  // of element 0
  const float* scales;    // of the block of element `begin`, and on
  int64_t begin, count;
  int block_shift;  // log2(blocksize)
};

struct Kernels {
  void (*widen)(DType, const void* from, int64_t count, float* to);
  void (*narrow)(DType, const float* from, int64_t count, void* to);

  // Whole blocks. `blocks` * `blocksize` elements.
  void (*quantize)(DType, const void* from, int64_t blocks, int64_t blocksize,
                   const float* thresholds, const uint8_t* order, uint8_t* packed, float* absmax);
  void (*decode)(DType, const Run&, void* to);

  // sum_i a[i] b[i], a of any type
  float (*dot)(DType, const void* a, const float* b, int64_t count);

  // Decode and dot in registers: y[i] = run . x[i] for i < m <= fused_rows. Null where there is no
  // such loop. The run is whole groups of 64 elements, none across a block's border; x is in the
  // layout that `arrange` gives it, arranged_size(count) floats a row. The second loop is for bf16
  // x: products of 16-bit integers (AVX2) or of bf16 (AVX512-BF16), exact enough for it; its
  // `arrange` says false to what it can't take.
  void (*fused_dot)(const Run&, int64_t m, const float* x, float* y);
  void (*arrange)(const float* from, int64_t count, float* to);
  void (*fixed_dot)(const Run&, int64_t m, const float* x, float* y);
  bool (*arrange_fixed)(const Codebook&, const float* from, int64_t count, float* to);

  // c[height, tile_width] (+)= a[height, depth] @ b[depth, tile_width], height <= tile_height.
  void (*tile)(int64_t height, int64_t depth, const float* a, int64_t lda, const float* b,
               int64_t ldb, float* c, int64_t ldc, bool add);
  int64_t tile_height, tile_width;
  decltype(tile) narrow_tile;  // half as wide

  // to[2 count] = a[0], b[0], a[1], b[1], ...
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* to);
  // Dropout of columns col .. col + count - 1 of a row, col a multiple of 8: see philox.h.
  void (*drop)(uint64_t seed, int64_t row, int64_t col, int64_t count, uint32_t threshold,
               float* x);
};

constexpr int64_t fused_group = 64, fused_rows = 4;

inline int64_t arranged_size(int64_t count) { return count + count / fused_group; }

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
void avx2_fixed_dot(const Run&, int64_t m, const float* x, float* y);
bool avx2_arrange_fixed(const Codebook&, const float* from, int64_t count, float* to);
const Kernels& avx512_kernels();
void avx512_bf16_fixed_dot(const Run&, int64_t m, const float* x, float* y);
bool avx512_bf16_arrange_fixed(const Codebook&, const float* from, int64_t count, float* to);
#endif

inline int64_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float from_bf16(uint16_t x) { return float_of(uint32_t{x} << 16); }

inline uint16_t to_bf16(float x) {
  uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
  uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
  if ((x & 0x7c00) == 0x7c00) return float_of(sign | 0x7f800000 | rest);
  return float_of(sign | bits_of(float_of(rest) * 0x1p112f));  // moves the exponent's bias; exact
}

inline uint16_t to_f16(float x) {
  uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= bits_of(65520.0f)) return sign | 0x7c00;
  if (size < bits_of(0x1p-14f))  // subnormal: the ulp of 0.5 is 2^-24
    return sign | uint16_t(bits_of(float_of(size) + 0.5f) - bits_of(0.5f));
  size += 0xfff + (size >> 13 & 1);
  return sign | uint16_t((size - 0x38000000) >> 13);
}

template <DType>
struct Element;

template <>
struct Element<DType::f32> {
  using type = float;
  static float widen(float x) { return x; }
  static float narrow(float x) { return x; }
};

template <>
struct Element<DType::bf16> {
  using type = uint16_t;
  static float widen(uint16_t x) { return from_bf16(x); }
  static uint16_t narrow(float x) { return to_bf16(x); }
};

template <>
struct Element<DType::f16> {
  using type = uint16_t;
  static float widen(uint16_t x) { return from_f16(x); }
  static uint16_t narrow(float x) { return to_f16(x); }
};

inline uint8_t nibble(const uint8_t* packed, int64_t i) {
  return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
}

}  // namespace pyfast::cpu
