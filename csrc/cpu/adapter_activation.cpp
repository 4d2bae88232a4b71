#include "adapter_activation.h"

#include "isa.h"
#include "nf4_kernels.h"

namespace pyfast::cpu {

namespace portable {
namespace {
#include "adapter_activation_loops.h"
}
}  // namespace portable

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
namespace {
#include "adapter_activation_loops.h"
}
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
namespace avx512 {
namespace {
#include "adapter_activation_loops.h"
}
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

void activate(Activation activation, const float* z, int64_t count, float scaling, float* h) {
  const auto loop = isa() >= Isa::avx512 ? avx512::activate : isa() >= Isa::avx2 ? avx2::activate : portable::activate;
  loop(activation, z, count, scaling, h);
}

void chain(Activation activation, const float* z, const float* dh, int64_t count, float scaling, float* dz) {
  const auto loop = isa() >= Isa::avx512 ? avx512::chain : isa() >= Isa::avx2 ? avx2::chain : portable::chain;
  loop(activation, z, dh, count, scaling, dz);
}

#else

void activate(Activation activation, const float* z, int64_t count, float scaling, float* h) {
  portable::activate(activation, z, count, scaling, h);
}

void chain(Activation activation, const float* z, const float* dh, int64_t count, float scaling, float* dz) {
  portable::chain(activation, z, dh, count, scaling, dz);
}

#endif

}  // namespace pyfast::cpu
