#include "cpu/adapter/activation.h"

#include "cpu/common/dtype.h"

#define LOOPS "cpu/adapter/activation_loops.h"
#include "cpu/common/each_isa.h"

namespace pyfast::cpu {

void activate(Activation activation, const float* z, int64_t count, float scaling, float* h) {
  BEST(activate)(activation, z, count, scaling, h);
}

void chain(Activation activation, const float* z, const float* dh, int64_t count, float scaling,
           float* dz) {
  BEST(chain)(activation, z, dh, count, scaling, dz);
}

}  // namespace pyfast::cpu
