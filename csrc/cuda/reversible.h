// As cpu/reversible.h, on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/reversible/step.h"

namespace pyfast::cuda {

// Raises *flag to what went wrong. Returns once launched.
cudaError_t reversible_step(const cpu::ReversibleStep&, int32_t* flag, cudaStream_t);

}  // namespace pyfast::cuda
