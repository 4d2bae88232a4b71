#include "cpu/common/kernels.h"
#include "cpu/nf4/inner_loops.h"

namespace pyfast::cpu {
namespace {

template <DType dtype>
struct Lookup {
  using T = typename Element<dtype>::type;
  const Codebook& code;
  T value[16];

  explicit Lookup(const Codebook& code) : code(code) {}
  void scale(float scale) {
    for (int n = 0; n < 16; ++n) value[n] = Element<dtype>::narrow(code.value[n] * scale);
  }
  void many(const uint8_t* packed, T* to) const {
    for (int i = 0; i < 16; ++i) {
      to[2 * i] = value[packed[i] >> 4];
      to[2 * i + 1] = value[packed[i] & 15];
    }
  }
};

uint8_t rank(float x, const float* thresholds) {
  int n = 0;
  for (int step = 8; step; step /= 2) n += x > thresholds[n + step - 1] ? step : 0;
  return uint8_t(n);
}

void quantize(DType dtype, const void* from, int64_t blocks, int64_t blocksize,
              const float* thresholds, const uint8_t* order, uint8_t* packed, float* absmax) {
  constexpr int kMaxBlocksize = 4096;
  float x[kMaxBlocksize];
  auto bytes = static_cast<const char*>(from);
  for (int64_t b = 0; b < blocks;
       ++b, bytes += blocksize * item_size(dtype), packed += blocksize / 2) {
    portable_kernels().widen(dtype, bytes, blocksize, x);
    uint32_t max = 0;  // compared as bits, where a NaN is above all numbers
    for (int64_t i = 0; i < blocksize; ++i) {
      uint32_t size = bits_of(x[i]) & 0x7fffffff;
      max = size > max ? size : max;
    }
    absmax[b] = float_of(max);
    const float inverse = 1.0f / (absmax[b] < 1e-38f ? 1e-38f : absmax[b]);
    for (int64_t i = 0; i < blocksize; i += 2) {
      const uint8_t high = order[rank(x[i] * inverse, thresholds)],
                    low = order[rank(x[i + 1] * inverse, thresholds)];
      packed[i / 2] = uint8_t(high << 4 | low);
    }
  }
}

}  // namespace

const NF4Kernels& portable_nf4_kernels() {
  static const NF4Kernels kernels = {quantize, decode<Lookup>, nullptr, nullptr, nullptr, nullptr};
  return kernels;
}

}  // namespace pyfast::cpu
