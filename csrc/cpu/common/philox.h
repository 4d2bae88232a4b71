// Dropout by counters. Element (row, col) is kept if its 16 bits of Philox4x32-7(seed; col / 8,
// row) are not below the threshold; the bits are half col % 2 of word col / 2 % 4. Included after a
// file has switched its instruction set on, so that the loops over kPhiloxLanes become vectors of
// it.
#pragma once

#include <cstdint>

namespace pyfast::cpu {
namespace {

constexpr int64_t kPhiloxLanes = 16, kColumnsPerLane = 8;

// Computes word[w][l], word w of counter `first + l`.
inline void philox(uint64_t seed, uint64_t row, uint32_t first, uint32_t (*word)[kPhiloxLanes]) {
  for (int64_t l = 0; l < kPhiloxLanes; ++l) {
    uint32_t c0 = first + uint32_t(l), c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
      c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
      c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    word[0][l] = c0, word[1][l] = c1, word[2][l] = c2, word[3][l] = c3;
  }
}

// Sets what is dropped of x[count] to 0. x holds columns col .. of a row; col is a multiple of 8.
inline void drop(uint64_t seed, int64_t row, int64_t col, int64_t count, uint32_t threshold,
                 float* x) {
  uint32_t word[4][kPhiloxLanes];
  for (int64_t i = 0; i < count; i += kPhiloxLanes * kColumnsPerLane) {
    philox(seed, uint64_t(row), uint32_t((col + i) / kColumnsPerLane), word);
    const int64_t here =
        count - i < kPhiloxLanes * kColumnsPerLane ? count - i : kPhiloxLanes * kColumnsPerLane;
    if (here == kPhiloxLanes * kColumnsPerLane) {
      for (int w = 0; w < 4; ++w)
        for (int64_t l = 0; l < kPhiloxLanes; ++l) {
          float* pair = x + i + l * kColumnsPerLane + 2 * w;
          pair[0] = (word[w][l] & 0xffff) >= threshold ? pair[0] : 0.0f;
          pair[1] = word[w][l] >> 16 >= threshold ? pair[1] : 0.0f;
        }
      continue;
    }
    for (int64_t j = 0; j < here; ++j) {
      const uint32_t bits = word[j / 2 % 4][j / kColumnsPerLane] >> (j & 1 ? 16 : 0) & 0xffff;
      if (bits < threshold) x[i + j] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace pyfast::cpu
