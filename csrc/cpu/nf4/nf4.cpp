// Quantizes and dequantizes. The products with a packed weight are in cpu/linear/.
#include "cpu/nf4/nf4.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "cpu/common/isa.h"
#include "cpu/common/kernels.h"
#include "cpu/common/scratch.h"
#include "cpu/nf4/weight_view.h"

namespace pyfast::cpu {

const NF4Kernels& nf4_kernels() {
#if defined(__x86_64__)
  static const NF4Kernels chosen = [] {
    NF4Kernels best = isa() >= Isa::avx512 ? avx512_nf4_kernels()
                      : isa() >= Isa::avx2 ? avx2_nf4_kernels()
                                           : portable_nf4_kernels();
    if (isa() >= Isa::avx512_bf16) {
      best.fixed_dot = avx512_bf16_fixed_dot;
      best.arrange_fixed = avx512_bf16_arrange_fixed;
    }
    return best;
  }();
  return chosen;
#else
  return portable_nf4_kernels();
#endif
}

Codebook make_codebook(const float* code) {
  Codebook book;
  for (int n = 0; n < 16; ++n) {
    book.value[n] = code[n];
    for (int p = 0; p < 4; ++p) book.plane[p][n] = uint8_t(bits_of(code[n]) >> 8 * p);
  }
  float largest = 0;
  for (int n = 0; n < 16; ++n) largest = std::max(largest, std::fabs(code[n]));
  book.unit =
      largest / 32640;  // 32640 = 192 * 170. FP4's codes are multiples of 1 / 192, hence exact
  book.fixed_exact = largest > 0;
  for (int n = 0; n < 16; ++n) {
    const long fixed = largest > 0 ? std::lrint(code[n] / book.unit) : 0;
    for (int p = 0; p < 2; ++p) book.fixed[p][n] = uint8_t(fixed >> 8 * p);
    book.fixed_exact &= std::fabs(fixed * book.unit - code[n]) <= std::fabs(code[n]) / 2048;
  }
  return book;
}

int log2_of_power(int64_t power) {
  int shift = 0;
  while (int64_t{1} << shift < power) ++shift;
  return shift;
}

// The product must be rounded before the sum, so it must not be contracted to an FMA.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
void decode_scales(const NF4View& w, int64_t first, int64_t count, float* to) {
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif
  if (w.absmax) {
    std::copy_n(w.absmax + first, count, to);
    return;
  }
  for (int64_t b = first, end = first + count; b < end;) {
    const int64_t stop = std::min(end, (b | 255) + 1);
    const float by = w.nested_absmax[b / 256];
    for (; b < stop; ++b) {
      const float product = w.nested_code[w.absmax_code[b]] * by;
      *to++ = product + w.offset;
    }
  }
}

namespace {

// Quantizes the last block if it is short. In contrast to a whole block it divides instead of
// multiplying by a reciprocal, and there is a floor under the absmax that it stores.
void quantize_short(const void* from, DType dtype, int64_t count, const float* thresholds,
                    const uint8_t* order, uint8_t* packed, float* absmax) {
  const Scratch scratch(count + 1);
  float* x = scratch.of(0);
  kernels().widen(dtype, from, count, x);
  uint32_t max = 0;  // compared as bits, where a NaN is above all numbers
  for (int64_t i = 0; i < count; ++i) max = std::max(max, bits_of(x[i]) & 0x7fffffff);
  *absmax = float_of(max) < 1e-38f ? 1e-38f : float_of(max);
  x[count] = 0;
  for (int64_t i = 0; i < count; i += 2) {
    uint8_t codes[2];
    for (int half = 0; half < 2; ++half) {
      const float v = i + half < count ? x[i + half] / *absmax : 0.0f;
      codes[half] =
          order[std::count_if(thresholds, thresholds + 15, [v](float t) { return v > t; })];
    }
    packed[i / 2] = uint8_t(codes[0] << 4 | codes[1]);
  }
}

}  // namespace

void nf4_quantize(const void* weight, DType dtype, int64_t numel, int64_t blocksize,
                  const float* thresholds, const uint8_t* order, uint8_t* packed, float* absmax) {
  const auto bytes = static_cast<const char*>(weight);
  const int64_t whole_blocks = numel / blocksize;
  at::parallel_for(0, whole_blocks, grain_size(blocksize), [&](int64_t begin, int64_t end) {
    nf4_kernels().quantize(dtype, bytes + begin * blocksize * item_size(dtype), end - begin,
                           blocksize, thresholds, order, packed + begin * blocksize / 2,
                           absmax + begin);
  });
  const int64_t done = whole_blocks * blocksize;
  if (done < numel)
    quantize_short(bytes + done * item_size(dtype), dtype, numel - done, thresholds, order,
                   packed + done / 2, absmax + whole_blocks);
}

void nf4_quantize_scales(const float* absmax, int64_t blocks, float offset, const float* thresholds,
                         uint8_t* codes, float* nested_absmax) {
  at::parallel_for(0, at::divup(blocks, 256), 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * 256, last = std::min(blocks, first + 256);
      uint32_t max = 0;
      for (int64_t b = first; b < last; ++b)
        max = std::max(max, bits_of(absmax[b] - offset) & 0x7fffffff);
      nested_absmax[g] = float_of(max);
      const float inverse = 1.0f / nested_absmax[g];
      for (int64_t b = first; b < last; ++b) {
        const float d = (absmax[b] - offset) * inverse;
        int rank = 0;
        for (int step = 128; step; step /= 2) rank += d > thresholds[rank + step - 1] ? step : 0;
        codes[b] = uint8_t(rank);
      }
    }
  });
}

void nf4_dequantize(const NF4View& view, DType dtype, void* out) {
  const NF4Weight w(view);
  constexpr int64_t kStep = 4096;  // even, so that a step starts at a byte
  const int64_t numel = view.rows * view.cols;
  const Scratch scales(w.max_scales(kStep), at::get_num_threads());
  at::parallel_for(0, at::divup(numel, kStep), 8, [&](int64_t begin, int64_t end) {
    float* thread_scales = scales.of(at::get_thread_num());
    for (int64_t i = begin * kStep; i < std::min(numel, end * kStep); i += kStep)
      w.kernels.decode(dtype, w.run(i, std::min(kStep, numel - i), thread_scales),
                       static_cast<char*>(out) + i * item_size(dtype));
  });
}

}  // namespace pyfast::cpu
