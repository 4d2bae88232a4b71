// Calls that can be replayed.
//
// What a call read and that requires gradients is found in the graph that the call makes, which is
// then dropped. So a call runs the same way both times, and nothing is missed: parameters, captured
// tensors, and tensors anywhere in its arguments are found alike.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/function.h>

#include <utility>
#include <vector>

namespace pyfast {

using at::Tensor;
namespace py = pybind11;

// What a call depends on besides its arguments: autocast, and random numbers of the CPU and of
// every device in use.
class Environment {
 public:
  // Reads the environment without waiting for a device.
  static Environment current(bool random = true);
  void restore() const;
  // Drops the states of generators that have drawn no number since.
  void drop_unused();
  bool has_random() const { return !random_.empty(); }

 private:
  struct Autocast {
    c10::DeviceType device;
    bool enabled;
    at::ScalarType dtype;
  };
  std::vector<std::pair<at::Generator, Tensor>> random_;
  std::vector<Autocast> autocast_;
  bool autocast_cache_ = true;
};

// All of a tensor, or `length` elements from `first` on along a dimension.
struct Span {
  int64_t dim = 0, first = 0, length = -1;
  bool covers_all() const { return length < 0; }
  Tensor of(const Tensor& x) const {
    return covers_all() || !x.defined() ? x : x.narrow(dim, first, length);
  }
};

// What it takes to replay a call of F or G on one tensor.
struct Call {
  Span span;  // the part of the streams that the call reads
  Environment environment;
  bool x_requires_grad = false;
  // Whether the replay adds to .grad, where FSDP's hooks look for gradients; then `inputs` is one
  // stand-in.
  bool accumulates = false;
  // What the call read and that requires gradients: leaves, and stand-ins for other tensors.
  std::vector<Tensor> inputs;
  std::vector<int64_t> versions;
};

// Calls function.record(x). Returns its result and, with gradients enabled, what it takes to replay
// it.
std::pair<Tensor, Call> record(const py::object& function, const Tensor& x, bool x_requires_grad,
                               bool accumulates);

struct Gradients {
  Tensor dx;
  std::vector<Tensor> grads;  // of `inputs`; undefined if there is none
};

// A replayed call, function.replay(x) with the same x: first its value, then its gradients.
class Replay {
 public:
  Replay(const py::object& function, const Call&, const Tensor& x);
  // Returns the value and does not hold it any longer, since the gradients need the memory.
  Tensor take();
  Gradients gradients(const Tensor& dout) &&;

 private:
  const Call& call_;
  Tensor x_, out_;
  at::ScalarType dtype_;
  torch::autograd::Edge root_;       // of the replay's graph
  torch::autograd::edge_list ends_;  // one for each input
};

}  // namespace pyfast
