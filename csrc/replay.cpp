#include "replay.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/SequenceNumber.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
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
    now.autocast_.push_back(
        {device, at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)});
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
  explicit Then(const Environment& then) : now_(Environment::now(then.has_random())) { then.restore(); }
  ~Then() { now_.restore(); }
  Then(const Then&) = delete;

 private:
  const Environment now_;
};

// A call's graph is its own: nothing is packed for it by hooks that are about the graph around it, and no cast of a
// parameter is shared with another call's.
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

// The ends of a call's graph, as nothing but ends: hooks on them want the whole gradient, which comes later, and what
// lies behind them is not this call's.
class Ends {
 public:
  explicit Ends(const std::vector<Tensor>& inputs) {
    for (const auto& input : inputs) nodes_.push_back({impl::gradient_edge(input).function, {}, {}, {}});
    for (auto& node : nodes_) node.swap();
  }
  ~Ends() {  // of a node that is there twice, the first has all
    for (auto node = nodes_.rbegin(); node != nodes_.rend(); ++node) node->swap();
  }
  Ends(const Ends&) = delete;

 private:
  using Hook = std::unique_ptr<torch::autograd::FunctionPreHook>;
  struct Aside {
    decltype(Edge::function) node;
    std::vector<Hook> hooks;
    std::unordered_map<size_t, Hook> retains;
    torch::autograd::edge_list edges;

    void swap() {
      node->tensor_pre_hooks().swap(hooks);
      node->retains_grad_hooks().swap(retains);
      node->next_edges().swap(edges);
    }
  };
  std::vector<Aside> nodes_;
};

// A tensor at the edge of a graph: the leaf, or one that stands in for what the edge is of.
Tensor tensor_at(const Edge& edge) {
  if (auto* leaf = dynamic_cast<AccumulateGrad*>(edge.function.get())) return leaf->variable;
  const auto& metadata = edge.function->input_metadata(edge.input_nr);
  Tensor stand_in = at::empty({0}, metadata.options());
  impl::set_gradient_edge(stand_in, edge);
  return stand_in;
}

bool same_edge(const Edge& a, const Edge& b) {
  auto *x = dynamic_cast<AccumulateGrad*>(a.function.get()), *y = dynamic_cast<AccumulateGrad*>(b.function.get());
  return x && y ? x->variable.is_same(y->variable) : a == b;
}

// The edges at which the graph of `out` ends, but for that of x: leaves, what is `known`, and nodes older than `since`.
std::vector<Edge> ends_of(const Tensor& out, const Tensor& x, uint64_t since, const std::vector<Edge>& known) {
  std::vector<Edge> ends, open;
  std::unordered_set<Node*> entered;
  if (out.requires_grad()) open.push_back(impl::gradient_edge(out));
  while (!open.empty()) {
    const Edge edge = open.back();
    open.pop_back();
    auto* leaf = dynamic_cast<AccumulateGrad*>(edge.function.get());
    const bool is_known = std::any_of(known.begin(), known.end(), [&](auto& end) { return same_edge(end, edge); });
    if (leaf || is_known || edge.function->sequence_nr() < since) {
      const bool is_x = leaf && leaf->variable.is_same(x);
      if (!is_x && std::find(ends.begin(), ends.end(), edge) == ends.end()) ends.push_back(edge);
    } else if (entered.insert(edge.function.get()).second) {
      for (const auto& next : edge.function->next_edges())
        if (next.is_valid()) open.push_back(next);
    }
  }
  return ends;
}

struct Ran {
  Tensor x, out;
  uint64_t since;
};

std::string name_of(const py::object& half) { return py::str(half); }

Ran run(const py::object& method, const Tensor& value, bool requires_grad) {
  const OwnGraph guard;
  Ran ran{value.detach(), {}, at::sequence_number::peek()};
  ran.x.set_requires_grad(requires_grad);
  ran.out = py::cast<Tensor>(method(ran.x));
  return ran;
}

std::vector<int64_t> versions_of(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> versions;
  for (const auto& tensor : tensors) versions.push_back(tensor.grad_fn() ? 0 : int64_t(tensor._version()));
  return versions;
}

}  // namespace

std::pair<Tensor, Call> record(const py::object& half, const Tensor& x, bool x_requires_grad, bool accumulates) {
  if (!at::GradMode::is_enabled()) return {run(half.attr("first"), x, false).out, {}};
  Call call{{}, Environment::now(), x_requires_grad, accumulates, {}, {}};
  const Ran ran = run(half.attr("first"), x, x_requires_grad);
  call.environment.drop_unused();
  for (const auto& end : ends_of(ran.out, ran.x, ran.since, {})) call.inputs.push_back(tensor_at(end));
  if (accumulates && !call.inputs.empty()) {
    const bool leaves = std::none_of(call.inputs.begin(), call.inputs.end(), [](auto& t) { return t.grad_fn(); });
    TORCH_CHECK_NOT_IMPLEMENTED(leaves, name_of(half), " is under fully_shard and read a tensor that requires ",
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
  TORCH_CHECK(call.accumulates || call.versions == versions_of(call.inputs), "a parameter or other tensor that ",
              name_of(half), " read was changed in place since; it must not be, before the backward");
  const Then then(call.environment);
  const at::AutoGradMode enabled(true);
  const Ran ran = run(half.attr("again"), x, call.x_requires_grad);
  if (call.accumulates) return ran;
  std::vector<Edge> known;
  for (const auto& input : call.inputs) known.push_back(impl::gradient_edge(input));
  for (const auto& end : ends_of(ran.out, ran.x, ran.since, known)) {
    const bool is_known = std::any_of(known.begin(), known.end(), [&](auto& edge) { return same_edge(edge, end); });
    TORCH_CHECK(is_known, name_of(half), " read other tensors that require gradients in its replay than at first; it ",
                "must do the same both times");
  }
  return ran;
}

}  // namespace

Replayed replay(const py::object& half, const Call& call, const Tensor& x, const Tensor& dout) {
  const Ran ran = run_again(half, call, x);
  Replayed result{ran.out.detach(), {}, std::vector<Tensor>(call.inputs.size())};
  if (!dout.defined() || !ran.out.requires_grad()) return result;
  const Tensor slope = dout.detach().to(ran.out.scalar_type());  // whoever keeps it, keeps another tensor than dout
  const py::gil_scoped_release no_gil;
  if (call.accumulates) {
    torch::autograd::backward({ran.out}, {slope});
    result.dx = ran.x.grad();
    return result;
  }
  std::vector<Tensor> inputs = call.inputs;
  if (call.x_requires_grad) inputs.push_back(ran.x);
  if (inputs.empty()) return result;
  const Ends guard(call.inputs);
  result.grads = torch::autograd::grad({ran.out}, inputs, {slope}, std::nullopt, false, true);
  if (call.x_requires_grad) result.dx = result.grads.back(), result.grads.pop_back();
  return result;
}

}  // namespace pyfast
