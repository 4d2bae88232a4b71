// The element types of the CPU kernels, and exact scalar conversions between them.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyfast::cpu {

enum class DType { f32, bf16, f16 };

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

}  // namespace pyfast::cpu
