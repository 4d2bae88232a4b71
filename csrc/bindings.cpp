// The module pyfast._C: what Python calls directly. Importing it also registers the ops of
// schemas.cpp.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/common/isa.h"
#include "reversible/tape.h"

PYBIND11_MODULE(_C, m) {
  using namespace pyfast::cpu;
  m.attr("torch_version") = TORCH_VERSION;
#ifdef PYFAST_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.def(
      "isa", [] { return std::string(isa_name(isa())); },
      "Return the instruction set that the CPU kernels use.");
  m.def(
      "machine_isa", [] { return std::string(isa_name(machine_isa())); },
      "Return the best instruction set of this machine.");
  m.def("isa_reason", &isa_reason, "Return in one line why isa() is what it is.");
  pyfast::bind_reversible(m);
}
