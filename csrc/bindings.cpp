// pyfast._C: what Python asks of the binary itself. Importing it registers the ops of ops.cpp.

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
      "isa", [] { return std::string(isa_name(isa())); }, "The instructions the CPU kernels use.");
  m.def(
      "machine_isa", [] { return std::string(isa_name(machine_isa())); },
      "The best this machine has.");
  m.def("isa_reason", &isa_reason, "Why isa() is what it is, in a line.");
  pyfast::bind_reversible(m);
}
