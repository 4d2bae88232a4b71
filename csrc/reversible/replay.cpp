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
  std::vector<at::Generator> result{at::detail::getDefaultCPUGenerator()};
  if (const auto type = at::getAccelerator()) {
    const auto& hooks = at::globalContext().getAcceleratorHooksInterface(*type);
    for (c10::DeviceIndex i = 0; i < hooks.deviceCount(); ++i)
      if (hooks.hasPrimaryContext(i)) result.push_back(hooks.getDefaultGenerator(i));
  }
  return result;
}

Tensor state_of(at::Generator& generator) {
  const std::scoped_lock lock(generator.mutex());
  return generator.get_state();
}

}  // namespace

Environment Environment::current(bool random) {
  Environment current;
  for (auto& generator : random ? generators() : std::vector<at::Generator>())
    current.random_.emplace_back(generator, state_of(generator));
  std::vector<c10::DeviceType> devices{at::kCPU};
  if (const auto type = at::getAccelerator()) devices.push_back(*type);
  for (const auto device : devices)
    current.autocast_.push_back({device, at::autocast::is_autocast_enabled(device),
                                 at::autocast::get_autocast_dtype(device)});
  current.autocast_cache_ = at::autocast::is_autocast_cache_enabled();
  return current;
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

// Restores the environment of a call while the call is replayed.
class RestoreEnvironment {
 public:
  explicit RestoreEnvironment(const Environment& environment)
      : now_(Environment::current(environment.has_random())) {
    environment.restore();
  }
  ~RestoreEnvironment() { now_.restore(); }
  RestoreEnvironment(const RestoreEnvironment&) = delete;

 private:
  const Environment now_;
};

// Isolates a call's graph: hooks for the graph around it pack nothing for it, and no cast of a
// parameter is shared with another call.
class IsolateGraph {
 public:
  IsolateGraph() : hooks_(at::SavedTensorDefaultHooks::get_tls_state()) {
    at::SavedTensorDefaultHooks::set_tls_state({});
    at::autocast::clear_cache();
  }
  ~IsolateGraph() {
    at::autocast::clear_cache();
    at::SavedTensorDefaultHooks::set_tls_state(hooks_);
  }
  IsolateGraph(const IsolateGraph&) = delete;

 private:
  const at::impl::SavedTensorDefaultHooksTLS hooks_;
};

// Returns the leaf at the edge of a graph, or a stand-in for the tensor that the edge is of.
Tensor tensor_at(const Edge& edge) {
  if (auto* leaf = dynamic_cast<AccumulateGrad*>(edge.function.get())) return leaf->variable;
  const auto& metadata = edge.function->input_metadata(edge.input_nr);
  Tensor stand_in = at::empty({0}, metadata.options());
  impl::set_gradient_edge(stand_in, edge);
  return stand_in;
}

// A run of a call, and what tells the nodes that it made from others.
struct RecordedRun {
  Tensor x, out;
  uint64_t first_sequence_nr, thread;
  bool has_made(const Node& node) const {
    return node.thread_id() == thread && node.sequence_nr() >= first_sequence_nr;
  }
};

// Calls visit(edge) for every end of the graph behind `root` except x: for leaves, and for nodes
// that the call did not make.
template <class Visit>
void visit_ends(Edge& root, const RecordedRun& recorded, const Visit& visit) {
  std::vector<Node*> pending;
  std::unordered_set<Node*> visited;
  const auto follow = [&](Edge& edge) {
    Node* node = edge.function.get();
    auto* leaf = dynamic_cast<AccumulateGrad*>(node);
    if (!node || (leaf && leaf->variable.is_same(recorded.x))) return;
    if (leaf || !recorded.has_made(*node))
      visit(edge);
    else if (visited.insert(node).second)
      pending.push_back(node);
  };
  follow(root);
  while (!pending.empty()) {
    Node& node = *pending.back();
    pending.pop_back();
    auto& edges = node.next_edges();
    for (auto& edge : edges) follow(edge);
    // CopySlices holds its edges, except the first, a second time.
    if (auto* copy = dynamic_cast<torch::autograd::CopySlices*>(&node))
      std::copy(edges.begin() + 1, edges.end(), copy->fn->next_edges().begin() + 1);
  }
}

Edge root_of(const Tensor& out) { return out.requires_grad() ? impl::gradient_edge(out) : Edge(); }

// Returns whether this is the edge of an input, which is a leaf that may be frozen by now, or a
// stand-in.
bool is_edge_of(const Edge& edge, const Tensor& input) {
  if (auto* leaf = dynamic_cast<AccumulateGrad*>(edge.function.get()))
    return leaf->variable.is_same(input);
  return input.grad_fn() && impl::gradient_edge(input) == edge;
}

std::string name_of(const py::object& function) { return py::str(function); }

RecordedRun run(const py::object& method, const Tensor& value, bool requires_grad) {
  const IsolateGraph guard;
  RecordedRun recorded{
      value.detach(), {}, at::sequence_number::peek(), at::RecordFunction::currentThreadId()};
  recorded.x.set_requires_grad(requires_grad);
  recorded.out = py::cast<Tensor>(method(recorded.x));
  return recorded;
}

std::vector<int64_t> versions_of(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> versions;
  for (const auto& tensor : tensors)
    versions.push_back(tensor.grad_fn() ? 0 : int64_t(tensor._version()));
  return versions;
}

}  // namespace

std::pair<Tensor, Call> record(const py::object& function, const Tensor& x, bool x_requires_grad,
                               bool accumulates) {
  if (!at::GradMode::is_enabled()) return {run(function.attr("record"), x, false).out, {}};
  Call call{{}, Environment::current(), x_requires_grad, accumulates, {}, {}};
  const RecordedRun recorded = run(function.attr("record"), x, x_requires_grad);
  call.environment.drop_unused();
  torch::autograd::edge_list ends;
  Edge root = root_of(recorded.out);
  visit_ends(root, recorded, [&](const Edge& edge) {
    if (std::find(ends.begin(), ends.end(), edge) == ends.end()) ends.push_back(edge);
  });
  for (const auto& end : ends) call.inputs.push_back(tensor_at(end));
  if (accumulates && !call.inputs.empty()) {
    const bool leaves =
        std::none_of(call.inputs.begin(), call.inputs.end(), [](auto& t) { return t.grad_fn(); });
    TORCH_CHECK_NOT_IMPLEMENTED(
        leaves, name_of(function), " is under fully_shard and read a tensor that requires ",
        "gradients and was computed outside of it; it must be detached, or fully_shard ",
        "applied to the whole sequence");
    call.inputs = {at::empty({0}, x.options().dtype(at::kFloat)).requires_grad_()};
  } else {
    call.versions = versions_of(call.inputs);
  }
  return {recorded.out.detach(), std::move(call)};
}

namespace {

RecordedRun replay_call(const py::object& function, const Call& call, const Tensor& x) {
  TORCH_CHECK(call.accumulates || call.versions == versions_of(call.inputs),
              "a parameter or other tensor that ", name_of(function),
              " read was changed in place since; it must not be, before the backward");
  const RestoreEnvironment environment(call.environment);
  const at::AutoGradMode enabled(true);
  return run(function.attr("replay"), x, call.x_requires_grad);
}

// Ends the graph at fresh leaves, one for each input, instead of the nodes of what was read. Those
// nodes are shared with other threads and with the graph around, and autograd would call their
// hooks, which expect the whole gradient, with a part of it.
torch::autograd::edge_list detach_ends(Edge& root, const RecordedRun& recorded,
                                       const std::vector<Tensor>& inputs,
                                       const py::object& function) {
  torch::autograd::edge_list ends;
  for (size_t i = 0; i < inputs.size(); ++i)
    ends.push_back(impl::gradient_edge(at::empty({0}, at::kFloat).requires_grad_()));
  visit_ends(root, recorded, [&](Edge& edge) {
    const auto input = std::find_if(inputs.begin(), inputs.end(),
                                    [&](auto& tensor) { return is_edge_of(edge, tensor); });
    TORCH_CHECK(input != inputs.end(), name_of(function),
                " read other tensors that require gradients in its replay than ",
                "at first; it must do the same both times");
    const Edge& end = ends[input - inputs.begin()];
    // Metadata can be copied, but not assigned.
    auto& metadata = end.function->mutable_input_metadata(0);
    std::destroy_at(&metadata);
    new (&metadata) torch::autograd::InputMetadata(edge.function->input_metadata(edge.input_nr));
    edge = end;
  });
  return ends;
}

}  // namespace

Replay::Replay(const py::object& function, const Call& call, const Tensor& x) : call_(call) {
  const RecordedRun recorded = replay_call(function, call, x);
  x_ = recorded.x, out_ = recorded.out.detach(), dtype_ = recorded.out.scalar_type(),
  root_ = root_of(recorded.out);
  if (!call.accumulates) ends_ = detach_ends(root_, recorded, call.inputs, function);
}

Tensor Replay::take() { return std::exchange(out_, {}); }

Gradients Replay::gradients(const Tensor& dout) && {
  Gradients result{{}, std::vector<Tensor>(call_.inputs.size())};
  if (!dout.defined() || !root_.is_valid()) return result;
  // A hook that keeps its argument must keep another tensor than dout.
  const Tensor grad = dout.detach().to(dtype_);
  auto& engine = torch::autograd::Engine::get_default_engine();
  const py::gil_scoped_release no_gil;
  if (call_.accumulates) {
    engine.execute({root_}, {grad}, /*keep_graph=*/false, /*create_graph=*/false,
                   /*accumulate_grad=*/true);
    result.dx = x_.grad();
    return result;
  }
  if (call_.x_requires_grad) ends_.push_back(impl::gradient_edge(x_));
  if (ends_.empty()) return result;
  result.grads = engine.execute({root_}, {grad}, /*keep_graph=*/false, /*create_graph=*/false,
                                /*accumulate_grad=*/false, ends_);
  if (call_.x_requires_grad) result.dx = result.grads.back(), result.grads.pop_back();
  return result;
}

}  // namespace pyfast
