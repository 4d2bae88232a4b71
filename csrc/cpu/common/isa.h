// Which instruction set the CPU kernels use: what the machine has, capped by PYFAST_CPU.
#pragma once

#include <string>

namespace pyfast::cpu {

// Each includes those before it. With the last one torch's brgemm multiplies bf16, on AMX where the
// machine has it.
enum class Isa { portable, avx2, avx512, avx512_bf16 };

// Returns min(machine, PYFAST_CPU), which is read once.
Isa isa();

const char* isa_name(Isa);
Isa machine_isa();

// Returns in one line why isa() is what it is ("PYFAST_CPU=avx2", "no AVX512-BF16 here", ...).
std::string isa_reason();

}  // namespace pyfast::cpu
