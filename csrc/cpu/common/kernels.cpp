#include "cpu/common/kernels.h"

#include "cpu/common/isa.h"

namespace pyfast::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = isa() >= Isa::avx512 ? avx512_kernels()
                                 : isa() >= Isa::avx2 ? avx2_kernels()
                                                      : portable_kernels();
  return chosen;
#else
  return portable_kernels();
#endif
}

}  // namespace pyfast::cpu
