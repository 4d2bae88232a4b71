// Which instructions the CPU kernels may use: what the machine has, capped by PYFAST_CPU.
#pragma once

#include <string>

namespace pyfast::cpu {

// Each includes those before it. The last: bf16 products by torch's brgemm, on AMX where the
// machine has it.
enum class Isa { portable, avx2, avx512, avx512_bf16 };

Isa isa();  // read once: min(machine, PYFAST_CPU)
const char* isa_name(Isa);
Isa machine_isa();
std::string isa_reason();  // one line: why this one ("PYFAST_CPU=avx2", "avx512bf16 missing", ...)

}  // namespace pyfast::cpu
