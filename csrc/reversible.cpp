#include "reversible.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

namespace pyfast {
namespace {

void step(Tensor stream, const Tensor& out, bool subtract, int64_t bits, Tensor flag,
          const std::optional<Tensor>& dz = {}, const std::optional<Tensor>& gz = {}) {
  if (!stream.is_non_overlapping_and_dense()) {  // a span of each example's tokens
    const auto of = [](const std::optional<Tensor>& x, int64_t i) { return x ? std::optional((*x)[i]) : std::nullopt; };
    for (int64_t i = 0; i < stream.size(0); ++i) step(stream[i], out[i], subtract, bits, flag, of(dz, i), of(gz, i));
    return;
  }
  using Step =
      void(Tensor&, const Tensor&, bool, int64_t, Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("pyfast::reversible_step", "").typed<Step>();
  const py::gil_scoped_release no_gil;
  const at::NoGradGuard no_grad;
  op.call(stream, out, subtract, bits, flag, dz, gz);
}

Tensor laid_out_as(const Tensor& like, const Tensor& from, c10::ScalarType dtype) {
  return at::empty_strided(like.sizes(), like.strides(), from.options().dtype(dtype)).copy_(from);
}

}  // namespace

Tape::Tape(const Tensor& x1, const Tensor& x2, int64_t bits, bool fixed, Tensor flags)
    : dtype_(x1.scalar_type()),
      slope_dtype_(bits < 0 ? dtype_ : at::kFloat),
      bits_(bits),
      fixed_(fixed),
      flags_(std::move(flags)) {
  stream_ = {entered(x1, 0), entered(x2, 1)};
}

// A caller's tensor stays as it is: not owned. Rounded streams are copies, of an equal layout.
Tensor Tape::entered(const Tensor& x, int64_t slot) {
  const Tensor value = x.detach();
  if (bits_ < 0) return value;
  owned_[slot] = true;
  Tensor stream = at::zeros_like(value, value.options().dtype(fixed_ ? at::kInt : at::kFloat));
  step(stream, value, false, bits_, flag(slot));
  return stream;
}

Tensor Tape::read(const Tensor& stream) const {
  if (!fixed_) return stream.to(dtype_);
  return stream.to(at::kFloat).mul_(std::ldexp(1.0, -int(bits_))).to(dtype_);
}

// Ours to change: made here, and held by nobody else, such as by a function that keeps what it was given.
void Tape::own(int64_t i) {
  Tensor& stream = stream_[i];
  const bool alone = stream.use_count() == 1 && stream.storage().use_count() == 1;
  if (!(owned_[i] && alone)) stream = stream.clone();
  owned_[i] = true;
}

std::shared_ptr<Call> Tape::forward(int64_t reads, const py::object& half, int64_t slot, bool x_requires_grad,
                                    bool accumulates, int64_t dim, int64_t first, int64_t length) {
  const Span span{dim, first, length};
  auto [out, call] = record(half, read(span.of(stream_[reads])), x_requires_grad, accumulates);
  call.span = span;
  own(1 - reads);
  step(span.of(stream_[1 - reads]), out, false, bits_, flag(slot));
  return std::make_shared<Call>(std::move(call));
}

std::pair<Tensor, Tensor> Tape::streams(bool last) {
  if (!last) return {stream_[0].clone(), stream_[1].clone()};
  own(0), own(1);
  return {std::exchange(stream_[0], {}), std::exchange(stream_[1], {})};
}

void Tape::resume(int64_t block, const Tensor& y1, const Tensor& y2) { resumed_[block] = {y1.detach(), y2.detach()}; }

void Tape::clear() { stream_ = slope_ = returned_ = {}, resumed_.clear(); }

std::vector<std::optional<Tensor>> Tape::backward(int64_t block, const std::vector<Made>& calls,
                                                  const std::optional<Tensor>& d1, const std::optional<Tensor>& d2) {
  if (auto start = resumed_.extract(block)) stream_ = std::move(start.mapped()), owned_ = {};
  slope_ = {d1.value_or(Tensor()), d2.value_or(Tensor())};
  for (int i : {0, 1}) slope_owned_[i] = slope_[i].defined() && slope_[i].is_same(returned_[i]);
  returned_ = {};
  std::vector<Tensor> grads(2);
  for (auto made = calls.rbegin(); made != calls.rend(); ++made) {
    const auto& [reads, half, call] = *made;
    for (auto& grad : undo(reads, half, *call)) grads.push_back(std::move(grad));
  }
  grads[0] = slope_[0], grads[1] = slope_[1];
  std::vector<std::optional<Tensor>> found;
  for (const auto& grad : grads) found.push_back(grad.defined() ? std::optional(grad) : std::nullopt);
  for (int i : {0, 1})
    if (slope_owned_[i]) returned_[i] = slope_[i];
  slope_ = {};
  return found;
}

std::vector<Tensor> Tape::undo(int64_t reads, const py::object& half, const Call& call) {
  const Span& span = call.span;
  auto again = replay(half, call, read(span.of(stream_[reads])), span.of(slope_[1 - reads]));
  own(1 - reads);
  const Tensor add = make_room(reads, span, again.dx);
  const bool adds = add.defined();
  step(span.of(stream_[1 - reads]), again.out, true, bits_, flag(flags_.numel() - 1),
       adds ? std::optional(span.of(slope_[reads])) : std::nullopt, adds ? std::optional(add) : std::nullopt);
  return std::move(again.grads);
}

// What is left to add to the gradient of a stream, which is made ours.
Tensor Tape::make_room(int64_t i, const Span& span, Tensor slope) {
  if (!slope.defined()) return slope;
  if (!slope_[i].defined() && !span.whole()) {
    slope_[i] = at::zeros_like(stream_[1 - i], stream_[1 - i].options().dtype(slope_dtype_));
    slope_owned_[i] = true;
    return slope;
  }
  const bool first = !slope_[i].defined();
  const bool alone = !first && slope_[i].storage().use_count() == 1;  // else a hook keeps it, or F passed it on
  if (slope_owned_[i] && alone) return slope;
  slope_[i] = laid_out_as(stream_[1 - i], first ? slope : slope_[i], slope_dtype_);
  slope_owned_[i] = true;
  return first ? Tensor() : slope;
}

void bind_reversible(py::module_& m) {
  py::class_<Environment>(m, "Environment")
      .def_static("now", [] { return Environment::now(); })
      .def("restore", &Environment::restore);
  py::class_<Call, std::shared_ptr<Call>>(m, "Call").def_readonly("inputs", &Call::inputs);
  py::class_<Tape>(m, "Tape")
      .def(py::init<const Tensor&, const Tensor&, int64_t, bool, Tensor>())
      .def("forward", &Tape::forward)
      .def("backward", &Tape::backward)
      .def("read", &Tape::read)
      .def("streams", &Tape::streams)
      .def("resume", &Tape::resume)
      .def("clear", &Tape::clear);
}

}  // namespace pyfast
