#include "reversible/tape.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

namespace pyfast {
namespace {

void step(Tensor stream, const Tensor& out, bool subtract, int64_t bits, Tensor flag) {
  // A span of each example's tokens is not dense; it is done example by example.
  if (!stream.is_non_overlapping_and_dense()) {
    for (int64_t i = 0; i < stream.size(0); ++i) step(stream[i], out[i], subtract, bits, flag);
    return;
  }
  using Step = void(Tensor&, const Tensor&, bool, int64_t, Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pyfast::reversible_step", "").typed<Step>();
  const py::gil_scoped_release no_gil;
  const at::NoGradGuard no_grad;
  op.call(stream, out, subtract, bits, flag);
}

}  // namespace

Tape::Tape(const Tensor& x1, const Tensor& x2, int64_t bits, bool fixed, Tensor flags)
    : dtype_(x1.scalar_type()),
      grad_dtype_(bits < 0 ? dtype_ : at::kFloat),
      bits_(bits),
      fixed_(fixed),
      flags_(std::move(flags)) {
  forward_.value = {enter(x1, 0), enter(x2, 1)};
  forward_.owned = {bits >= 0, bits >= 0};
}

// Returns an input as a stream. A caller's tensor must not change, so it is not owned. Rounded
// streams are copies of the same layout.
Tensor Tape::enter(const Tensor& x, int64_t slot) {
  const Tensor value = x.detach();
  if (bits_ < 0) return value;
  Tensor stream = at::zeros_like(value, value.options().dtype(fixed_ ? at::kInt : at::kFloat));
  step(stream, value, false, bits_, flag(slot));
  return stream;
}

Tensor Tape::read(const Tensor& stream) const {
  if (!fixed_) return stream.to(dtype_);
  return stream.to(at::kFloat).mul_(std::ldexp(1.0, -int(bits_))).to(dtype_);
}

// Makes a stream safe to change. It is safe if it was made here and nothing else holds it, such as
// a function that keeps its argument; otherwise it is copied.
void Tape::Streams::make_owned(int64_t i) {
  const bool is_alone = value[i].use_count() == 1 && value[i].storage().use_count() == 1;
  if (!(owned[i] && is_alone)) value[i] = value[i].clone();
  owned[i] = true;
}

std::shared_ptr<Call> Tape::forward(int64_t reads, const py::object& function, int64_t slot,
                                    bool x_requires_grad, bool accumulates, int64_t dim,
                                    int64_t first, int64_t length) {
  const Span span{dim, first, length};
  auto [out, call] =
      record(function, read(span.of(forward_.value[reads])), x_requires_grad, accumulates);
  call.span = span;
  forward_.make_owned(1 - reads);
  step(span.of(forward_.value[1 - reads]), out, false, bits_, flag(slot));
  return std::make_shared<Call>(std::move(call));
}

std::pair<Tensor, Tensor> Tape::streams(bool last) {
  auto& [x1, x2] = forward_.value;
  if (!last) return {x1.clone(), x2.clone()};
  forward_.make_owned(0), forward_.make_owned(1);
  return {std::exchange(x1, {}), std::exchange(x2, {})};
}

void Tape::resume(int64_t at, const Tensor& y1, const Tensor& y2) {
  backward_[torch::autograd::get_current_graph_task_id()].resumed[at] = {y1.detach(), y2.detach()};
}

void Tape::finish(int64_t task) { backward_.erase(task); }

std::vector<std::optional<Tensor>> Tape::backward(int64_t at, int64_t reads,
                                                  const py::object& function, const Call& call,
                                                  const std::optional<Tensor>& d1,
                                                  const std::optional<Tensor>& d2) {
  Backward& back = backward_.at(torch::autograd::get_current_graph_task_id());
  if (auto start = back.resumed.extract(at)) back.streams = {std::move(start.mapped())};
  back.grad = {d1.value_or(Tensor()), d2.value_or(Tensor())};
  for (int i : {0, 1})
    back.grad_owned[i] = back.grad[i].defined() && back.grad[i].is_same(back.returned[i]);
  back.returned = {};
  std::vector<std::optional<Tensor>> result(2);
  for (auto& grad : undo(back, reads, function, call))
    result.push_back(grad.defined() ? std::optional(std::move(grad)) : std::nullopt);
  for (int i : {0, 1}) {
    if (back.grad[i].defined()) result[i] = back.grad[i];
    if (back.grad_owned[i]) back.returned[i] = back.grad[i];
  }
  back.grad = {};
  return result;
}

std::vector<Tensor> Tape::undo(Backward& back, int64_t reads, const py::object& function,
                               const Call& call) {
  const Span& span = call.span;
  auto& value = back.streams.value;
  Replay replay(function, call, read(span.of(value[reads])));
  back.streams.make_owned(1 - reads);
  step(span.of(value[1 - reads]), replay.take(), true, bits_, flag(flags_.numel() - 1));
  auto [dx, grads] = std::move(replay).gradients(span.of(back.grad[1 - reads]));
  if (dx.defined()) add_gradient(back, reads, span, std::move(dx));
  return std::move(grads);
}

// Adds to the gradient of a stream: in place if the tape owns it, otherwise with the layout that
// autograd gives its sums. The order in which others add its elements depends on that layout.
void Tape::add_gradient(Backward& back, int64_t i, const Span& span, Tensor grad) {
  const at::NoGradGuard no_grad;
  Tensor& sum = back.grad[i];
  // The storage is shared if a hook keeps the gradient, or F passed it on.
  const auto is_alone = [&] { return sum.storage().use_count() == 1; };
  const bool first = !sum.defined(), is_owned = !first && back.grad_owned[i] && is_alone();
  back.grad_owned[i] = true;
  if (first && span.covers_all()) {
    sum = std::move(grad).to(grad_dtype_);
    back.grad_owned[i] = sum.use_count() == 1 && is_alone();
  } else if (!first && !is_owned && span.covers_all()) {
    sum = sum.add(grad);
  } else {
    if (first) sum = at::zeros(back.streams.value[i].sizes(), grad.options().dtype(grad_dtype_));
    if (!first && !is_owned) sum = sum.clone();
    step(span.of(sum), grad, false, -1, flag(flags_.numel() - 1));
  }
}

void bind_reversible(py::module_& m) {
  using torch::wrap_pybind_function;  // so that errors have torch's types, such as OutOfMemoryError
  py::class_<Environment>(m, "Environment")
      .def_static("now", [] { return Environment::current(); })
      .def("restore", &Environment::restore);
  py::class_<Call, std::shared_ptr<Call>>(m, "Call").def_readonly("inputs", &Call::inputs);
  py::class_<Tape>(m, "Tape")
      .def(py::init<const Tensor&, const Tensor&, int64_t, bool, Tensor>())
      .def("forward", wrap_pybind_function(&Tape::forward))
      .def("backward", wrap_pybind_function(&Tape::backward))
      .def("read", wrap_pybind_function(&Tape::read))
      .def("streams", wrap_pybind_function(&Tape::streams))
      .def("resume", &Tape::resume)
      .def("finish", &Tape::finish);
}

}  // namespace pyfast
