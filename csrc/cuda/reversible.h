// The arithmetic of reversible streams on a GPU; see cpu/reversible/step.h.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/reversible/step.h"

namespace pyfast::cuda {

// Launches the step and returns. The kernel raises *flag to the worst error.
cudaError_t reversible_step(const cpu::ReversibleStep&, int32_t* flag, cudaStream_t);

}  // namespace pyfast::cuda
