#include "adapter_activation.h"

#include "nf4_kernels.h"

#define LOOPS "adapter_activation_loops.h"
#include "each_isa.h"

namespace pyfast::cpu {

void activate(Activation activation, const float* z, int64_t count, float scaling, float* h) {
  BEST(activate)(activation, z, count, scaling, h);
}

void chain(Activation activation, const float* z, const float* dh, int64_t count, float scaling, float* dz) {
  BEST(chain)(activation, z, dh, count, scaling, dz);
}

}  // namespace pyfast::cpu
