// Activations of an adapter's hidden values, and their derivatives.
#pragma once

#include "cpu/adapter/adapter.h"

namespace pyfast::cpu {

// Computes h = scaling * act(z).
void activate(Activation, const float* z, int64_t count, float scaling, float* h);

// Computes dz = scaling * dh * act'(z); dz may be dh.
void chain(Activation, const float* z, const float* dh, int64_t count, float scaling, float* dz);

}  // namespace pyfast::cpu
