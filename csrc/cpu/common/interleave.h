// Pairs up two rows of 16-bit elements. Included after a file has switched its instruction set on;
// the anonymous namespace keeps each copy in its file.
#pragma once

#include <cstdint>

namespace pyfast::cpu {
namespace {

inline void interleave(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[2 * i] = a[i], to[2 * i + 1] = b[i];
}

}  // namespace
}  // namespace pyfast::cpu
