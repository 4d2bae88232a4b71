#include "cpu/common/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyfast::cpu {
namespace {

struct Choice {
  Isa isa;
  std::string reason;
};

#if defined(__x86_64__)

bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

Choice best_of_machine() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
    return {Isa::portable, "no AVX2, FMA and F16C here"};
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return {Isa::avx2, "no AVX-512 F, BW, VL and DQ here"};
  if (!has_avx512_bf16()) return {Isa::avx512, "no AVX512-BF16 here"};
  return {Isa::avx512_bf16, "all there"};
}

#else

Choice best_of_machine() { return {Isa::portable, "not an x86-64 machine"}; }

#endif

Isa parse(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (name == isa_name(isa)) return isa;
  throw std::invalid_argument("PYFAST_CPU=" + name +
                              ": expected portable, avx2, avx512 or avx512_bf16");
}

Choice choose() {
  Choice best = best_of_machine();
  const char* requested = std::getenv("PYFAST_CPU");
  if (!requested || !*requested) return best;
  Isa cap = parse(requested);
  std::string request = std::string("PYFAST_CPU=") + requested;
  if (cap > best.isa) return {best.isa, request + ", but " + best.reason};
  return {cap, request};
}

const Choice& choice() {
  static const Choice cached = choose();
  return cached;
}

}  // namespace

Isa isa() { return choice().isa; }

Isa machine_isa() {
  static const Isa best = best_of_machine().isa;
  return best;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

std::string isa_reason() { return choice().reason; }

}  // namespace pyfast::cpu
