#include "lsh_loops.h"

#include "isa.h"

namespace pyfast::cpu {

typedef float Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourPlaces{__VA_ARGS__})
#endif

namespace portable {
namespace {
constexpr int lanes = 4, registers = 16;
#include "lsh_loops_inner.h"
}  // namespace
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
constexpr int lanes = 8, registers = 16;
#include "lsh_loops_inner.h"
}  // namespace
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
constexpr int lanes = 16, registers = 32;
#include "lsh_loops_inner.h"
}  // namespace
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const LSHLoops& lsh_loops() {
  return isa() >= Isa::avx512 ? avx512::loops : isa() >= Isa::avx2 ? avx2::loops : portable::loops;
}

#else

const LSHLoops& lsh_loops() { return portable::loops; }

#endif

}  // namespace pyfast::cpu
