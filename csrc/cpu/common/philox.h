// Dropout by counters: element (row, col) is kept if its 16 bits of Philox4x32-7(seed; col / 8,
// row) are not below the threshold; the bits are half col % 2 of word col / 2 % 4. Included where
// an instruction set is switched on, as nf4_inner.h is: the loops over `lanes` become vectors.
#pragma once

#include <cstdint>

namespace pyfast::cpu {
namespace {

constexpr int64_t lanes = 16, lane_columns = 8;

// word[w][l]: word w of counter `first + l`.
inline void philox(uint64_t seed, uint64_t row, uint32_t first, uint32_t (*word)[lanes]) {
  for (int64_t l = 0; l < lanes; ++l) {
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

// x[count], columns col .. of a row: what is dropped becomes 0. col is a multiple of 8.
inline void drop(uint64_t seed, int64_t row, int64_t col, int64_t count, uint32_t threshold,
                 float* x) {
  uint32_t word[4][lanes];
  for (int64_t i = 0; i < count; i += lanes * lane_columns) {
    philox(seed, uint64_t(row), uint32_t((col + i) / lane_columns), word);
    const int64_t here = count - i < lanes * lane_columns ? count - i : lanes * lane_columns;
    if (here == lanes * lane_columns) {
      for (int w = 0; w < 4; ++w)
        for (int64_t l = 0; l < lanes; ++l) {
          float* pair = x + i + l * lane_columns + 2 * w;
          pair[0] = (word[w][l] & 0xffff) >= threshold ? pair[0] : 0.0f;
          pair[1] = word[w][l] >> 16 >= threshold ? pair[1] : 0.0f;
        }
      continue;
    }
    for (int64_t j = 0; j < here; ++j) {
      const uint32_t bits = word[j / 2 % 4][j / lane_columns] >> (j & 1 ? 16 : 0) & 0xffff;
      if (bits < threshold) x[i + j] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace pyfast::cpu
