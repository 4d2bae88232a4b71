// Includes the header LOOPS once for each instruction set, in namespaces of their names: portable,
// avx2, avx512. The source file defines LOOPS as the header's name in quotes, written from csrc/.
// The header finds kLanes, the floats of a vector, and kRegisters. This file has no guard, because
// a source may include it for several headers. BEST(f) is the f that this machine runs best.
#include "cpu/common/isa.h"

namespace pyfast::cpu::portable {
namespace {
[[maybe_unused]] constexpr int kLanes = 4, kRegisters = 16;
#include LOOPS
}  // namespace
}  // namespace pyfast::cpu::portable

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace pyfast::cpu::avx2 {
namespace {
[[maybe_unused]] constexpr int kLanes = 8, kRegisters = 16;
#include LOOPS
}  // namespace
}  // namespace pyfast::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
namespace pyfast::cpu::avx512 {
namespace {
[[maybe_unused]] constexpr int kLanes = 16, kRegisters = 32;
#include LOOPS
}  // namespace
}  // namespace pyfast::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define BEST(f) (isa() >= Isa::avx512 ? avx512::f : isa() >= Isa::avx2 ? avx2::f : portable::f)

#else

#define BEST(f) (portable::f)

#endif
