// The CPU implementations of LoRA's ops.
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/linear/lora.h"
#include "ops/checks.h"

namespace pyfast {
namespace {

at::TensorOptions floats() { return at::device(at::kCPU).dtype(at::kFloat); }

// Returns a small factor as contiguous fp32. Activations are not cast; the kernels read them as
// they are.
Tensor fp32(const Tensor& tensor, const char* name, at::IntArrayRef shape) {
  check_sizes(tensor, name, shape);
  dtype_of(tensor.scalar_type(), name);
  return tensor.to(at::kFloat).contiguous();
}

std::optional<Tensor> fp32(const std::optional<Tensor>& tensor, const char* name, int64_t size) {
  return tensor ? std::optional<Tensor>(fp32(*tensor, name, at::IntArrayRef{size})) : std::nullopt;
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

// The frozen weight: a dense one, or the state of a 4-bit one.
struct BaseWeight {
  Tensor dense;
  std::optional<cpu::FrozenWeight> base;

  BaseWeight(at::TensorList tensors, at::IntArrayRef shape, int64_t blocksize) {
    if (blocksize) {
      base.emplace(nf4_matrix_view(tensors, shape, blocksize));
      return;
    }
    TORCH_CHECK_VALUE(tensors.size() == 1 && shape.size() == 2 && tensors[0].sizes() == shape &&
                          tensors[0].is_cpu(),
                      "base must be one tensor of shape ", shape, " on the CPU");
    dense = tensors[0].contiguous();
    base.emplace(cpu::DenseView{dense.const_data_ptr(), dtype_of(dense.scalar_type(), "weight"),
                                shape[0], shape[1]});
  }
};

// Checks a route, which is empty or [order, starts, scales]. Every index is checked, since they
// come from the caller.
struct CheckedRoute {
  std::vector<Tensor> contiguous;
  std::vector<float> scales;
  cpu::Route route{};

  CheckedRoute(at::TensorList tensors, int64_t m, int64_t adapters)
      : scales(size_t(adapters), 1.0f) {
    TORCH_CHECK_VALUE(tensors.size() == 0 || tensors.size() == 3, "route holds ", tensors.size(),
                      " tensors; it must hold none, or order, starts and scales");
    if (tensors.empty()) {
      TORCH_CHECK_VALUE(adapters == 1, "route is empty; with ", adapters,
                        " adapters it must not be");
      route.segments.push_back({0, m, 0});
      return;
    }
    for (const Tensor& tensor : tensors) contiguous.push_back(tensor.contiguous());
    check_vector(contiguous[0], "order", at::kInt, m);
    check_vector(contiguous[1], "starts", at::kInt, adapters + 1);
    check_vector(contiguous[2], "scales", at::kFloat, adapters);
    route.order = contiguous[0].const_data_ptr<int32_t>();
    std::vector<bool> seen(size_t(m), false);
    for (int64_t i = 0; i < m; ++i) {
      const int32_t row = route.order[i];
      TORCH_CHECK_VALUE(row >= 0 && row < m && !seen[size_t(row)],
                        "order is not a permutation of the rows");
      seen[size_t(row)] = true;
    }
    const int32_t* starts = contiguous[1].const_data_ptr<int32_t>();
    for (int64_t i = 0; i < adapters; ++i) {
      TORCH_CHECK_VALUE(starts[i] >= 0 && starts[i] <= starts[i + 1] && starts[i + 1] <= m,
                        "starts is not a sequence of row numbers");
      route.segments.push_back({starts[i], starts[i + 1], i});
      scales[size_t(i)] = contiguous[2].const_data_ptr<float>()[i];
    }
  }

  std::vector<float> scaled(double factor) const {
    std::vector<float> result = scales;
    for (float& scale : result) scale = float(scale * factor);
    return result;
  }
};

float keep_scale(uint32_t threshold) { return float(1 / (1 - threshold / 65536.0)); }

cpu::Mask mask_of(double p, const std::optional<Tensor>& seeds, int64_t i) {
  const uint32_t threshold = dropout_threshold(p);
  if (threshold == 0) return {0, 0};
  TORCH_CHECK_VALUE(
      seeds && seeds->scalar_type() == at::kLong && seeds->is_cpu() && seeds->numel() > i,
      "seeds must be an int64 tensor on the CPU, with one for each mask");
  return {threshold, uint64_t(seeds->contiguous().const_data_ptr<int64_t>()[i])};
}

void check_adapters(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 3, name, " has shape ", tensor.sizes(),
                    "; it must have three dimensions");
}

int64_t last_size(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() > 0 && x.is_cpu(), name, " has shape ", x.sizes(),
                    "; it must have rows, on the CPU");
  return x.size(-1);
}

Tensor lora_shrink(const Tensor& x, at::TensorList lora_a, at::ArrayRef<double> scaling,
                   double dropout_p, const std::optional<Tensor>& seeds, at::TensorList route) {
  const int64_t in_features = last_size(x, "x"), m = row_count(x);
  TORCH_CHECK_VALUE(!lora_a.empty() && lora_a.size() == scaling.size(), "lora_a holds ",
                    lora_a.size(), " tensors and scaling ", scaling.size(),
                    " numbers; they must be as many, and not none");
  const Tensor rows = x.contiguous();
  int64_t total = 0;
  for (const Tensor& a : lora_a) check_adapters(a, "lora_a"), total += a.size(1);
  auto sizes = x.sizes().vec();
  sizes.back() = total;
  Tensor s = at::empty(sizes, floats());
  float* out = s.mutable_data_ptr<float>();
  for (size_t i = 0; i < lora_a.size(); ++i) {
    const int64_t n = lora_a[i].size(0), rank = lora_a[i].size(1);
    const CheckedRoute checked(route, m, n);
    const auto mask = mask_of(dropout_p, seeds, int64_t(i));
    check_sizes(lora_a[i], "lora_a", {n, rank, in_features});
    const Tensor a = lora_a[i].contiguous();
    const auto scales = checked.scaled(scaling[i] * keep_scale(mask.threshold));
    cpu::project_to_rank({{dtype_of(x.scalar_type(), "x")},
                          rows.const_data_ptr(),
                          m,
                          in_features,
                          rank,
                          mask,
                          a.const_data_ptr(),
                          dtype_of(a.scalar_type(), "lora_a"),
                          /*transposed=*/true,
                          /*gain=*/nullptr,
                          scales.data(),
                          checked.route,
                          out,
                          total});
    out += rank;
  }
  return s;
}

Tensor lora_linear(const Tensor& x, const Tensor& s, at::TensorList base, const Tensor& lora_b,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& gain,
                   at::IntArrayRef shape, int64_t blocksize, at::TensorList route) {
  const BaseWeight weight(base, shape, blocksize);
  check_adapters(lora_b, "lora_b");
  auto [rows, y] = rows_and_result(x, "x", weight.base->cols, weight.base->rows);
  const int64_t m = row_count(x), n = lora_b.size(0), rank = lora_b.size(2);
  const Tensor b = fp32(lora_b, "lora_b", {n, weight.base->rows, rank});
  TORCH_CHECK_VALUE(last_size(s, "s") == rank && row_count(s) == m, "s has shape ", s.sizes(),
                    "; it must have the rows of x and ", rank, " columns");
  const Tensor sums = s.to(at::kFloat).contiguous();
  const auto biases = fp32(bias, "bias", weight.base->rows),
             gains = fp32(gain, "gain", weight.base->rows);
  CheckedRoute checked(route, m, n);
  cpu::linear(*weight.base, {{dtype_of(x.scalar_type(), "x")},
                             rows.const_data_ptr(),
                             y.mutable_data_ptr(),
                             m,
                             data_or_null(biases),
                             data_or_null(gains),
                             rank,
                             sums.const_data_ptr<float>(),
                             b.const_data_ptr<float>(),
                             std::move(checked.route)});
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_expand_backward(
    const Tensor& dy, const Tensor& s, const Tensor& lora_b, const std::optional<Tensor>& gain,
    const std::optional<Tensor>& z, double scaling, at::TensorList route, c10::List<bool> needs) {
  TORCH_CHECK_VALUE(needs.size() == 4, "needs holds ", needs.size(), " flags; it must hold 4");
  check_adapters(lora_b, "lora_b");
  const int64_t out = last_size(dy, "dy"), m = row_count(dy), n = lora_b.size(0),
                rank = lora_b.size(2);
  TORCH_CHECK_VALUE(last_size(s, "s") == rank && row_count(s) == m, "s has shape ", s.sizes(),
                    "; it must have the rows of dy and ", rank, " columns");
  TORCH_CHECK_VALUE(
      z ? z->sizes() == dy.sizes() && z->scalar_type() == dy.scalar_type() && z->is_cpu()
        : !needs[3],
      "z must be as dy is, and there for its sum");
  const auto type = dtype_of(dy.scalar_type(), "dy");
  check_sizes(lora_b, "lora_b", {n, out, rank});
  const Tensor rows = dy.contiguous(), b = lora_b.contiguous();
  const auto gains = fp32(gain, "gain", out);
  const CheckedRoute checked(route, m, n);
  Tensor u = at::empty({0}, floats()), db = at::empty({0}, lora_b.options());
  Tensor sum = at::empty({needs[2] ? out : 0}, floats()),
         weighted = at::empty({needs[3] ? out : 0}, floats());
  if (needs[0]) {
    u = at::empty(s.sizes(), floats());
    const auto scales = checked.scaled(scaling);
    cpu::project_to_rank({{type},
                          rows.const_data_ptr(),
                          m,
                          out,
                          rank,
                          {0, 0},
                          b.const_data_ptr(),
                          dtype_of(b.scalar_type(), "lora_b"),
                          /*transposed=*/false,
                          data_or_null(gains),
                          scales.data(),
                          checked.route,
                          u.mutable_data_ptr<float>(),
                          rank});
  }
  if (!needs[1] && !needs[2] && !needs[3]) return {u, db, sum, weighted};
  const Tensor left = s.to(at::kFloat).contiguous(), weight = z ? z->contiguous() : rows;
  Tensor result = at::empty({needs[1] ? n : 0, rank, out}, floats());
  cpu::sum_outer_products({{type},
                           left.const_data_ptr<float>(),
                           m,
                           rank,
                           rank,
                           rows.const_data_ptr(),
                           weight.const_data_ptr(),
                           out,
                           n,
                           {0, 0},
                           checked.route,
                           needs[1] ? result.mutable_data_ptr<float>() : nullptr,
                           needs[2] ? sum.mutable_data_ptr<float>() : nullptr,
                           needs[3] ? weighted.mutable_data_ptr<float>() : nullptr});
  if (needs[1])
    db = (gains ? at::mul(result, *gains) : result)
             .transpose(1, 2)
             .to(lora_b.scalar_type())
             .contiguous();
  return {u, db, sum, weighted};
}

Tensor lora_linear_backward(const Tensor& dy, const Tensor& u, at::TensorList base,
                            const Tensor& lora_a, const std::optional<Tensor>& gain,
                            const std::optional<Tensor>& add, at::IntArrayRef shape,
                            int64_t blocksize, double dropout_p, const std::optional<Tensor>& seed,
                            at::TensorList route) {
  const BaseWeight weight(base, shape, blocksize);
  check_adapters(lora_a, "lora_a");
  auto [rows, dx] = rows_and_result(dy, "dy", weight.base->rows, weight.base->cols);
  const int64_t m = row_count(dy), n = lora_a.size(0), rank = lora_a.size(1);
  TORCH_CHECK_VALUE(last_size(u, "u") == rank && row_count(u) == m, "u has shape ", u.sizes(),
                    "; it must have the rows of dy and ", rank, " columns");
  TORCH_CHECK_VALUE(!add || (add->sizes() == dx.sizes() && add->scalar_type() == dy.scalar_type() &&
                             add->is_cpu()),
                    "add must be as the result is");
  const auto mask = mask_of(dropout_p, seed, 0);
  const Tensor a = fp32(lora_a, "lora_a", {n, rank, weight.base->cols});
  const Tensor u_float = u.to(at::kFloat).contiguous();
  const Tensor sums = mask.threshold ? at::mul(u_float, keep_scale(mask.threshold)) : u_float;
  const Tensor more = add ? add->contiguous() : Tensor();
  const auto gains = fp32(gain, "gain", weight.base->rows);
  CheckedRoute checked(route, m, n);
  cpu::linear_backward(*weight.base, {{dtype_of(dy.scalar_type(), "dy")},
                                      rows.const_data_ptr(),
                                      dx.mutable_data_ptr(),
                                      m,
                                      add ? more.const_data_ptr() : nullptr,
                                      data_or_null(gains),
                                      rank,
                                      sums.const_data_ptr<float>(),
                                      a.const_data_ptr<float>(),
                                      mask.threshold,
                                      mask.seed,
                                      std::move(checked.route)});
  return dx;
}

std::vector<Tensor> lora_shrink_backward(const Tensor& u, const Tensor& x, at::IntArrayRef ranks,
                                         int64_t n, double dropout_p,
                                         const std::optional<Tensor>& seeds, at::TensorList route,
                                         at::ScalarType dtype) {
  for (const int64_t rank : ranks)
    TORCH_CHECK_VALUE(rank >= 0, "ranks holds ", rank, "; it must hold sizes");
  TORCH_CHECK_VALUE(n >= 0, "n is ", n, "; it must be a number of adapters");
  const int64_t in_features = last_size(x, "x"), m = row_count(x), total = c10::sum_integers(ranks);
  TORCH_CHECK_VALUE(last_size(u, "u") == total && row_count(u) == m, "u has shape ", u.sizes(),
                    "; it must have the rows of x and ", total, " columns");
  const Tensor rows = x.contiguous(), left = u.to(at::kFloat).contiguous();
  const CheckedRoute checked(route, m, n);
  std::vector<Tensor> result;
  const float* from = left.const_data_ptr<float>();
  for (size_t i = 0; i < ranks.size(); ++i) {
    const auto mask = mask_of(dropout_p, seeds, int64_t(i));
    Tensor da = at::empty({n, ranks[i], in_features}, floats());
    cpu::sum_outer_products({{dtype_of(x.scalar_type(), "x")},
                             from,
                             m,
                             ranks[i],
                             total,
                             rows.const_data_ptr(),
                             /*weight=*/nullptr,
                             in_features,
                             n,
                             mask,
                             checked.route,
                             da.mutable_data_ptr<float>(),
                             /*sum=*/nullptr,
                             /*weighted=*/nullptr});
    if (mask.threshold) da.mul_(keep_scale(mask.threshold));
    result.push_back(da.to(dtype));
    from += ranks[i];
  }
  return result;
}

Tensor lora_row_squares(at::TensorList base, at::IntArrayRef shape, int64_t blocksize) {
  const BaseWeight weight(base, shape, blocksize);
  Tensor squares = at::empty({weight.base->rows}, floats());
  cpu::row_squares(*weight.base, squares.mutable_data_ptr<float>());
  return squares;
}

}  // namespace

TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("lora_shrink", lora_shrink);
  m.impl("lora_linear", lora_linear);
  m.impl("lora_expand_backward", lora_expand_backward);
  m.impl("lora_linear_backward", lora_linear_backward);
  m.impl("lora_shrink_backward", lora_shrink_backward);
  m.impl("lora_row_squares", lora_row_squares);
}

}  // namespace pyfast
