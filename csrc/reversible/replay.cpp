#include "reversible/replay.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/SequenceNumber.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>

namespace pyfast {

using torch::autograd::AccumulateGrad;
using torch::autograd::Edge;
using torch::autograd::Node;
namespace impl = torch::autograd::impl;

namespace {

std::vector<at::Generator> generators() {
  std::vector<at::Generator> found{at::detail::getDefaultCPUGenerator()};
  if (const auto type = at::getAccelerator()) {
    const auto& hooks = at::globalContext().getAcceleratorHooksInterface(*type);
    for (c10::DeviceIndex i = 0; i < hooks.deviceCount(); ++i)
      if (hooks.hasPrimaryContext(i)) found.push_back(hooks.getDefaultGenerator(i));
  }
  return found;
}

Tensor state_of(at::Generator& generator) {
  const std::scoped_lock lock(generator.mutex());
  return generator.get_state();
}

}  // namespace

Environment Environment::now(bool random) {
  Environment now;
  for (auto& generator : random ? generators() : std::vector<at::Generator>())
    now.random_.emplace_back(generator, state_of(generator));
  std::vector<c10::DeviceType> devices{at::kCPU};
  if (const auto type = at::getAccelerator()) devices.push_back(*type);
  for (const auto device : devices)
    now.autocast_.push_back({device, at::autocast::is_autocast_enabled(device),
                             at::autocast::get_autocast_dtype(device)});
  now.autocast_cache_ = at::autocast::is_autocast_cache_enabled();
  return now;
}

void Environment::restore() const {
  for (auto [generator, state] : random_) {
    const std::scoped_lock lock(generator.mutex());
    generator.set_state(state);
  }
  for (const auto& [device, enabled, dtype] : autocast_) {
    at::autocast::set_autocast_enabled(device, enabled);
    at::autocast::set_autocast_dtype(device, dtype);
  }
  at::autocast::set_autocast_cache_enabled(autocast_cache_);
}

void Environment::drop_unused() {
  const auto unused = [](auto& entry) { return at::equal(state_of(entry.first), entry.second); };
  random_.erase(std::remove_if(random_.begin(), random_.end(), unused), random_.end());
}

namespace {

// The environment of a call, for as long as it is made again.
class Then {
 public:
  explicit Then(const Environment& then) : now_(Environment::now(then.has_random())) {
    then.restore();
  }
  ~Then() { now_.restore(); }
  Then(const Then&) = delete;

 private:
  const Environment now_;
};

// A call's graph is its own: nothing is packed for it by hooks that are about the graph around it,
// and no cast of a parameter is shared with another call's.
class OwnGraph {
 public:
  OwnGraph() : hooks_(at::SavedTensorDefaultHooks::get_tls_state()) {
    at::SavedTensorDefaultHooks::set_tls_state({});
    at::autocast::clear_cache();
  }
  ~OwnGraph() {
    at::autocast::clear_cache();
    at::SavedTensorDefaultHooks::set_tls_state(hooks_);
  }
  OwnGraph(const OwnGraph&) = delete;

 private:
  const at::impl::SavedTensorDefaultHooksTLS hooks_;
};

// A tensor at the edge of a graph: the leaf, or one that stands in for what the edge is of.
Tensor tensor_at(const Edge& edge) {
  if (auto* leaf = dynamic_cast<AccumulateGrad*>(edge.function.get())) return leaf->variable;
  const auto& metadata = edge.function->input_metadata(edge.input_nr);
  Tensor stand_in = at::empty({0}, metadata.options());
  impl::set_gradient_edge(stand_in, edge);
  return stand_in;
}

struct Ran {
  Tensor x, out;
  uint64_t since, thread;
  bool made(const Node& node) const {
    return node.thread_id() == thread && node.sequence_nr() >= since;
  }
};

// visit(edge) where the graph behind `root` ends, but for x: at leaves, and at nodes that the call
// did not make.
template <class Visit>
void visit_ends(Edge& root, const Ran& ran, const Visit& visit) {
  std::vector<Node*> open;
  std::unordered_set<Node*> entered;
  const auto follow = [&](Edge& edge) {
    Node* node = edge.function.get();
    auto* leaf = dynamic_cast<AccumulateGrad*>(node);
    if (!node || (leaf && leaf->variable.is_same(ran.x))) return;
    if (leaf || !ran.made(*node))
      visit(edge);
    else if (entered.insert(node).second)
      open.push_back(node);
  };
  follow(root);
  while (!open.empty()) {
    Node& node = *open.back();
    open.pop_back();
    auto& edges = node.next_edges();
    for (auto& edge : edges) follow(edge);
    if (auto* copy = dynamic_cast<torch::autograd::CopySlices*>(
            &node))  // which holds them, but the first, twice
      std::copy(edges.begin() + 1, edges.end(), copy->fn->next_edges().begin() + 1);
  }
}

Edge root_of(const Tensor& out) { return out.requires_grad() ? impl::gradient_edge(out) : Edge(); }

// Whether that is the edge of a tensor of `inputs`, a leaf that may be frozen by now, or a
// stand-in.
bool is_of(const Edge& edge, const Tensor& input) {
  if (auto* leaf = dynamic_cast<AccumulateGrad*>(edge.function.get()))
    return leaf->variable.is_same(input);
  return input.grad_fn() && impl::gradient_edge(input) == edge;
}

std::string name_of(const py::object& half) { return py::str(half); }

Ran run(const py::object& method, const Tensor& value, bool requires_grad) {
  const OwnGraph guard;
  Ran ran{value.detach(), {}, at::sequence_number::peek(), at::RecordFunction::currentThreadId()};
  ran.x.set_requires_grad(requires_grad);
  ran.out = py::cast<Tensor>(method(ran.x));
  return ran;
}

std::vector<int64_t> versions_of(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> versions;
  for (const auto& tensor : tensors)
    versions.push_back(tensor.grad_fn() ? 0 : int64_t(tensor._version()));
  return versions;
}

}  // namespace

std::pair<Tensor, Call> record(const py::object& half, const Tensor& x, bool x_requires_grad,
                               bool accumulates) {
  if (!at::GradMode::is_enabled()) return {run(half.attr("first"), x, false).out, {}};
  Call call{{}, Environment::now(), x_requires_grad, accumulates, {}, {}};
  const Ran ran = run(half.attr("first"), x, x_requires_grad);
  call.environment.drop_unused();
  torch::autograd::edge_list ends;
  Edge root = root_of(ran.out);
  visit_ends(root, ran, [&](const Edge& edge) {
    if (std::find(ends.begin(), ends.end(), edge) == ends.end()) ends.push_back(edge);
  });
  for (const auto& end : ends) call.inputs.push_back(tensor_at(end));
  if (accumulates && !call.inputs.empty()) {
    const bool leaves =
        std::none_of(call.inputs.begin(), call.inputs.end(), [](auto& t) { return t.grad_fn(); });
    TORCH_CHECK_NOT_IMPLEMENTED(
        leaves, name_of(half), " is under fully_shard and read a tensor that requires ",
        "gradients and was computed outside of it; it must be detached, or fully_shard ",
        "applied to the whole sequence");
    call.inputs = {at::empty({0}, x.options().dtype(at::kFloat)).requires_grad_()};
  } else {
    call.versions = versions_of(call.inputs);
  }
  return {ran.out.detach(), std::move(call)};
}

namespace {

Ran run_again(const py::object& half, const Call& call, const Tensor& x) {
  TORCH_CHECK(call.accumulates || call.versions == versions_of(call.inputs),
              "a parameter or other tensor that ", name_of(half),
              " read was changed in place since; it must not be, before the backward");
  const Then then(call.environment);
  const at::AutoGradMode enabled(true);
  return run(half.attr("again"), x, call.x_requires_grad);
}

// Ends the graph at nodes of its own, one for each input, instead of the nodes of what was read.
// Those are shared with other threads and the graph around, and autograd calls their hooks, which
// want the whole gradient, for any part.
torch::autograd::edge_list detach_ends(Edge& root, const Ran& ran,
                                       const std::vector<Tensor>& inputs, const py::object& half) {
  torch::autograd::edge_list ends;
  for (size_t i = 0; i < inputs.size(); ++i)
    ends.push_back(impl::gradient_edge(at::empty({0}, at::kFloat).requires_grad_()));
  visit_ends(root, ran, [&](Edge& edge) {
    const auto at =
        std::find_if(inputs.begin(), inputs.end(), [&](auto& input) { return is_of(edge, input); });
    TORCH_CHECK(at != inputs.end(), name_of(half),
                " read other tensors that require gradients in its replay than ",
                "at first; it must do the same both times");
    const Edge& end = ends[at - inputs.begin()];
    auto& metadata =
        end.function->mutable_input_metadata(0);  // which can be copied, but not assigned
    std::destroy_at(&metadata);
    new (&metadata) torch::autograd::InputMetadata(edge.function->input_metadata(edge.input_nr));
    edge = end;
  });
  return ends;
}

}  // namespace

Replay::Replay(const py::object& half, const Call& call, const Tensor& x) : call_(call) {
  const Ran ran = run_again(half, call, x);
  x_ = ran.x, out_ = ran.out.detach(), dtype_ = ran.out.scalar_type(), root_ = root_of(ran.out);
  if (!call.accumulates) ends_ = detach_ends(root_, ran, call.inputs, half);
}

Tensor Replay::take() { return std::exchange(out_, {}); }

Gradients Replay::gradients(const Tensor& dout) && {
  Gradients found{{}, std::vector<Tensor>(call_.inputs.size())};
  if (!dout.defined() || !root_.is_valid()) return found;
  const Tensor slope =
      dout.detach().to(dtype_);  // whoever keeps it, keeps another tensor than dout
  auto& engine = torch::autograd::Engine::get_default_engine();
  const py::gil_scoped_release no_gil;
  if (call_.accumulates) {
    engine.execute({root_}, {slope}, false, false, true);
    found.dx = x_.grad();
    return found;
  }
  if (call_.x_requires_grad) ends_.push_back(impl::gradient_edge(x_));
  if (ends_.empty()) return found;
  found.grads = engine.execute({root_}, {slope}, false, false, false, ends_);
  if (call_.x_requires_grad) found.dx = found.grads.back(), found.grads.pop_back();
  return found;
}

}  // namespace pyfast
