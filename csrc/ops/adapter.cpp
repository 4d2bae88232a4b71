// The CPU implementations of the bottleneck adapter's ops.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "cpu/adapter/adapter.h"
#include "ops/checks.h"

namespace pyfast {
namespace {

cpu::Activation activation_of(c10::string_view name) {
  constexpr std::pair<const char*, cpu::Activation> kActivations[] = {
      {"relu", cpu::Activation::relu},
      {"gelu", cpu::Activation::gelu},
      {"gelu_tanh", cpu::Activation::gelu_tanh},
      {"silu", cpu::Activation::silu},
      {"tanh", cpu::Activation::tanh}};
  for (const auto& [word, activation] : kActivations)
    if (name == word) return activation;
  TORCH_CHECK_VALUE(false, "activation is '", name,
                    "'; it must be relu, gelu, gelu_tanh, silu or tanh");
}

cpu::Values values_of(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), name)};
}

// The parameters of an adapter, contiguous, and as the kernels take them.
struct AdapterParameters {
  Tensor down, up, down_bias, up_bias;  // a bias may be undefined
  cpu::AdapterView view{};

  AdapterParameters(const Tensor& x, const Tensor& down_weight,
                    const std::optional<Tensor>& down_bias_, const Tensor& up_weight,
                    const std::optional<Tensor>& up_bias_, c10::string_view activation,
                    double scaling) {
    TORCH_CHECK_VALUE(down_weight.dim() == 2 && up_weight.dim() == 2,
                      "down_weight and up_weight must be matrices");
    view.bottleneck = down_weight.size(0), view.in = down_weight.size(1),
    view.out = up_weight.size(0);
    TORCH_CHECK_VALUE(view.bottleneck > 0,
                      "down_weight has no rows; the bottleneck must be at least 1 wide");
    TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == view.in, "x has shape ", x.sizes(),
                      "; its last dimension must be ", view.in);
    check_sizes(down_weight, "down_weight", {view.bottleneck, view.in});
    check_sizes(up_weight, "up_weight", {view.out, view.bottleneck});
    down = down_weight.contiguous(), up = up_weight.contiguous();
    view.down = values_of(down, "down_weight"), view.up = values_of(up, "up_weight");
    if (down_bias_) {
      check_sizes(*down_bias_, "down_bias", {view.bottleneck});
      view.down_bias = values_of(down_bias = down_bias_->contiguous(), "down_bias");
    }
    if (up_bias_) {
      check_sizes(*up_bias_, "up_bias", {view.out});
      view.up_bias = values_of(up_bias = up_bias_->contiguous(), "up_bias");
    }
    view.activation = activation_of(activation);
    view.scaling = float(scaling);
  }
};

Tensor adapter(const Tensor& x, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
               const Tensor& up_weight, const std::optional<Tensor>& up_bias,
               const std::optional<Tensor>& residual, c10::string_view activation, double scaling) {
  const AdapterParameters p(x, down_weight, down_bias, up_weight, up_bias, activation, scaling);
  const Tensor rows = x.contiguous(), add = residual ? residual->contiguous() : rows;
  check_sizes(add, "residual", sizes_with_last(x, p.view.out));
  Tensor y = at::empty(add.sizes(), add.options());
  cpu::adapter(values_of(rows, "x"), row_count(x), p.view, values_of(add, "residual"),
               y.mutable_data_ptr());
  return y;
}

// Gradients that are not needed are empty. The biases' gradients are in float32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& dy, const Tensor& x, const Tensor& down_weight,
    const std::optional<Tensor>& down_bias, const Tensor& up_weight, bool residual_is_x,
    c10::string_view activation, double scaling, std::array<bool, 5> needs) {
  const AdapterParameters p(x, down_weight, down_bias, up_weight, std::nullopt, activation,
                            scaling);
  const auto& v = p.view;
  check_sizes(dy, "dy", sizes_with_last(x, v.out));
  TORCH_CHECK_VALUE(!residual_is_x || v.in == v.out, "residual_is_x, but x is ", v.in,
                    " wide and dy ", v.out);
  const Tensor rows = x.contiguous(), dy_rows = dy.contiguous();
  const auto floats = x.options().dtype(at::kFloat);
  const auto make = [&](int i, at::IntArrayRef sizes, const at::TensorOptions& options) {
    return needs[i] ? at::empty(sizes, options) : at::empty({0}, options);
  };
  Tensor dx = make(0, x.sizes(), x.options()),
         d_down_weight = make(1, {v.bottleneck, v.in}, down_weight.options());
  Tensor d_down_bias = make(2, {v.bottleneck}, floats),
         d_up_weight = make(3, {v.out, v.bottleneck}, up_weight.options());
  Tensor d_up_bias = make(4, {v.out}, floats);
  const cpu::AdapterGradients to = {needs[0] ? dx.mutable_data_ptr() : nullptr,
                                    needs[1] ? d_down_weight.mutable_data_ptr() : nullptr,
                                    needs[3] ? d_up_weight.mutable_data_ptr() : nullptr,
                                    needs[2] ? d_down_bias.mutable_data_ptr<float>() : nullptr,
                                    needs[4] ? d_up_bias.mutable_data_ptr<float>() : nullptr};
  cpu::adapter_backward(values_of(dy_rows, "dy"), values_of(rows, "x"), row_count(x), v,
                        residual_is_x, to);
  return {dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("adapter", adapter);
  m.impl("adapter_backward", adapter_backward);
}

}  // namespace pyfast
