#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/reversible.h"

namespace pyfast::cuda {
namespace {

using cpu::DType;
using cpu::ReversibleStep;
using cpu::StreamType;

// The dtype is the same for all threads of a launch, so the branches do not diverge.
__device__ float load(DType dtype, const void* from, int64_t i) {
  switch (dtype) {
    case DType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    case DType::f16: return __half2float(static_cast<const __half*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}

__device__ void store(DType dtype, void* to, int64_t i, float x) {
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x); break;
    case DType::f16: static_cast<__half*>(to)[i] = __float2half_rn(x); break;
    default: static_cast<float*>(to)[i] = x;
  }
}

// Returns whether the sum left the grid.
__device__ bool add_grid(float* stream, float out, float scale, float unit) {
  const float y = *stream + rintf(out * scale) * unit;
  *stream = y;
  return !(fabsf(y) < 16777216.0f * unit);
}

// Returns whether the sum wrapped around, or the summand was no int32. Such a summand counts as the
// nearest int32, and NaN as 0.
__device__ bool add_fixed(int32_t* stream, float out, float scale) {
  constexpr float kMostUnits = 2147483520.0f;  // the largest float below 2^31
  const float units = rintf(out * scale);
  const int32_t x = *stream,
                r = isnan(units) ? 0 : int32_t(fminf(fmaxf(units, -kMostUnits), kMostUnits));
  const int32_t y = int32_t(uint32_t(x) + uint32_t(r));
  *stream = y;
  return !(fabsf(units) <= kMostUnits) || ((x ^ y) & (r ^ y)) < 0;
}

__global__ void step(ReversibleStep p, int32_t* flag) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  const float unit = 1 / p.scale;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += stride) {
    const float out = (p.subtract ? -1.0f : 1.0f) * load(p.out_dtype, p.out, i);
    bool has_left = false;
    switch (p.stream_type) {
      case StreamType::plain: store(p.dtype, p.stream, i, load(p.dtype, p.stream, i) + out); break;
      case StreamType::grid:
        has_left = add_grid(static_cast<float*>(p.stream) + i, out, p.scale, unit);
        break;
      case StreamType::fixed:
        has_left = add_fixed(static_cast<int32_t*>(p.stream) + i, out, p.scale);
        break;
    }
    if (has_left) atomicMax(flag, isfinite(out) ? cpu::kOverflow : cpu::kNotFinite);
  }
}

}  // namespace

cudaError_t reversible_step(const ReversibleStep& p, int32_t* flag, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  constexpr int kThreads = 256;
  const int64_t blocks = std::min<int64_t>((p.count + kThreads - 1) / kThreads, int64_t{1} << 16);
  step<<<unsigned(blocks), kThreads, 0, stream>>>(p, flag);
  return cudaGetLastError();
}

}  // namespace pyfast::cuda
