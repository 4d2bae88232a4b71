// Calls that can be made again.
//
// What gradients need to know of a call is read off the graph that it makes, which is then dropped:
// so a call runs the same way both times, and all that it reads is found, be it a parameter,
// captured, or anywhere in its arguments.
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

// What a call depends on beside its arguments: random numbers, of the CPU and of every device in
// use, and autocast.
class Environment {
 public:
  static Environment now(bool random = true);  // no device is waited for
  void restore() const;
  void drop_unused();  // the states of generators that have given no number since
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

// Of a tensor all, or `length` from `first` on along a dimension.
struct Span {
  int64_t dim = 0, first = 0, length = -1;
  bool whole() const { return length < 0; }
  Tensor of(const Tensor& x) const {
    return whole() || !x.defined() ? x : x.narrow(dim, first, length);
  }
};

// F or G was called, on one tensor: what it takes to call it again.
struct Call {
  Span span;  // of the streams
  Environment environment;
  bool x_requires_grad = false;
  bool accumulates =
      false;  // the replay adds to .grad, where FSDP's hooks look for it; `inputs` is a stand-in
  std::vector<Tensor>
      inputs;  // what it read that requires gradients: leaves, and stand-ins for other tensors
  std::vector<int64_t> versions;
};

// Calls half.first(x). The result, and with gradients enabled what to know to replay it.
std::pair<Tensor, Call> record(const py::object& half, const Tensor& x, bool x_requires_grad,
                               bool accumulates);

struct Gradients {
  Tensor dx;
  std::vector<Tensor> grads;  // of `inputs`; undefined: none
};

// A call made again, half.again(x), x being the same: its value, then its gradients.
class Replay {
 public:
  Replay(const py::object& half, const Call&, const Tensor& x);
  Tensor take();  // and hold it no more: the gradients' memory is its
  Gradients gradients(const Tensor& dout) &&;

 private:
  const Call& call_;
  Tensor x_, out_;
  at::ScalarType dtype_;
  torch::autograd::Edge root_;       // of the graph
  torch::autograd::edge_list ends_;  // for each input, its own
};

}  // namespace pyfast
