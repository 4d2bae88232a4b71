// The CPU implementations of LSH attention's ops.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/lsh/attention.h"
#include "ops/checks.h"

namespace pyfast {
namespace {

using Optional = std::optional<Tensor>;

template <class T, size_t count>
T value_of_name(c10::string_view name, const char* argument,
                const std::pair<const char*, T> (&values)[count]) {
  for (const auto& [word, value] : values)
    if (name == word) return value;
  TORCH_CHECK_VALUE(false, argument, " is '", name, "'; see lsh_attention");
}

Tensor checked_contiguous(const Tensor& tensor, const char* name, at::ScalarType type,
                          at::IntArrayRef sizes) {
  check_tensor(tensor, name, type, sizes);
  return tensor.contiguous();
}

// Returns the tensor, copied only if its rows have gaps.
Tensor dense_rows(const Tensor& tensor, const char* name, at::ScalarType type,
                  at::IntArrayRef sizes) {
  check_tensor(tensor, name, type, sizes);
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : tensor.contiguous();
}

template <class T>
cpu::HeadRows<T> rows_of(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  cpu::HeadRows<T> rows{nullptr, tensor.size(1), tensor.stride(0), tensor.stride(1),
                        tensor.stride(2)};
  if constexpr (std::is_const_v<T>)
    rows.data = tensor.const_data_ptr();
  else
    rows.data = tensor.mutable_data_ptr();
  return rows;
}

// Returns an empty tensor whose layout is like another's: by heads, or by tokens.
Tensor empty_like(const Tensor& like, int64_t heads, int64_t width) {
  const int64_t batch = like.size(0), n = like.size(2);
  if (like.stride(1) >= like.stride(2)) return at::empty({batch, heads, n, width}, like.options());
  return at::empty({batch, n, heads, width}, like.options()).transpose(1, 2);
}

void check_positions(const Tensor& tensor, const char* name, int64_t n) {
  const int32_t* at = tensor.const_data_ptr<int32_t>();
  uint32_t largest = 0;  // a negative position is above all others
  for (int64_t i = 0; i < tensor.numel(); ++i) largest = std::max(largest, uint32_t(at[i]));
  TORCH_CHECK_VALUE(tensor.numel() == 0 || largest < uint32_t(n), name,
                    " must hold positions, 0 .. ", n - 1);
}

// The arguments that forward and backward share, checked, and as the kernels take them.
struct Arguments {
  Tensor q, k, v, order, buckets, ranks, mask;
  cpu::LSHAttention view{};

  Arguments(const Tensor& q_, const Optional& k_, const Tensor& v_, const Tensor& order_,
            const Optional& buckets_, const Optional& ranks_, const Optional& mask_,
            const Optional& seed, double dropout_p, int64_t chunk_length, double scale,
            c10::string_view key_norm, c10::string_view wrap, bool causal, bool attend_self,
            bool mask_queries) {
    TORCH_CHECK_VALUE(q_.dim() == 4 && v_.dim() == 4, "q and v must have 4 dimensions, not ",
                      q_.dim(), " and ", v_.dim());
    TORCH_CHECK_VALUE(order_.dim() == 5, "order has ", order_.dim(), " dimensions; it must have 5");
    auto& p = view;
    p.batch = q_.size(0), p.heads = q_.size(1), p.n = q_.size(2), p.dim = q_.size(3);
    p.v_dim = v_.size(3), p.rounds = order_.size(3), p.chunk = chunk_length;
    p.dtype = dtype_of(q_.scalar_type(), "q");
    TORCH_CHECK_VALUE(p.n < std::numeric_limits<int32_t>::max(), "the length is ", p.n,
                      "; positions are int32");
    TORCH_CHECK_VALUE(p.rounds > 0, "order has no rounds");
    TORCH_CHECK_VALUE(chunk_length >= 16 && chunk_length <= 256 && chunk_length % 16 == 0,
                      "chunk_length is ", chunk_length, "; it must be a multiple of 16, 16 to 256");
    for (const int64_t dim : {p.dim, p.v_dim})
      TORCH_CHECK_VALUE(dim >= 1 && dim <= 256, "heads are ", dim, " wide; they must be 1 to 256");
    const auto type = q_.scalar_type();
    q = dense_rows(q_, "q", type, q_.sizes()),
    v = dense_rows(v_, "v", type, {p.batch, v_.size(1), p.n, p.v_dim});
    check_heads("v", v.size(1));
    p.q = rows_of<const void>(q), p.v = rows_of<const void>(v);
    if (k_) {
      TORCH_CHECK_VALUE(k_->dim() == 4, "k has ", k_->dim(), " dimensions; it must have 4");
      k = dense_rows(*k_, "k", type, {p.batch, k_->size(1), p.n, p.dim});
      check_heads("k", k.size(1));
      p.k = rows_of<const void>(k);
    }
    p.order = read_integers(order, order_, "order"), check_positions(order, "order", p.n);
    if (buckets_) p.buckets = read_integers(buckets, *buckets_, "buckets");
    if (ranks_)
      p.ranks = read_integers(ranks, *ranks_, "ranks"), check_positions(ranks, "ranks", p.n);
    if (mask_) {
      mask = checked_contiguous(*mask_, "mask", at::kBool, {p.batch, p.n});
      p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    }
    p.threshold = dropout_threshold(dropout_p);
    if (p.threshold) {
      TORCH_CHECK_VALUE(
          seed && seed->scalar_type() == at::kLong && seed->is_cpu() && seed->numel() == 1,
          "seed must be an int64 tensor of one element on the CPU");
      p.seed = uint64_t(seed->const_data_ptr<int64_t>()[0]);
    }
    p.scale = float(scale);
    p.key_norm = value_of_name<cpu::KeyNorm>(
        key_norm, "key_norm",
        {{"rms", cpu::KeyNorm::rms}, {"l2", cpu::KeyNorm::l2}, {"none", cpu::KeyNorm::none}});
    p.wrap = value_of_name<cpu::Wrap>(
        wrap, "wrap",
        {{"rounds", cpu::Wrap::rounds}, {"round", cpu::Wrap::round}, {"none", cpu::Wrap::none}});
    p.causal = causal, p.attend_self = attend_self, p.mask_queries = mask_queries;
  }

  void check_heads(const char* name, int64_t heads) const {
    const bool divides =
        heads == view.heads || (heads > 0 && view.heads > 0 && view.heads % heads == 0);
    TORCH_CHECK_VALUE(divides, name, " has ", heads, " heads; it must have a divisor of q's ",
                      view.heads);
  }

  const int32_t* read_integers(Tensor& to, const Tensor& from, const char* name) const {
    to = checked_contiguous(from, name, at::kInt,
                            {k.defined() ? 2 : 1, view.batch, view.heads, view.rounds, view.n});
    return to.const_data_ptr<int32_t>();
  }
};

std::tuple<Tensor, Tensor> lsh_attention(const Tensor& q, const Optional& k, const Tensor& v,
                                         const Tensor& order, const Optional& buckets,
                                         const Optional& ranks, const Optional& mask,
                                         const Optional& seed, double dropout_p,
                                         int64_t chunk_length, double scale,
                                         c10::string_view key_norm, c10::string_view wrap,
                                         bool causal, bool attend_self, bool mask_queries) {
  const Arguments arguments(q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length,
                            scale, key_norm, wrap, causal, attend_self, mask_queries);
  const auto& p = arguments.view;
  Tensor out = empty_like(q, p.heads, p.v_dim);
  Tensor lse = at::empty({p.batch, p.heads, p.n}, q.options().dtype(at::kFloat));
  cpu::lsh_attention(p, rows_of<void>(out), lse.mutable_data_ptr<float>());
  return {out, lse};
}

// Gradients that are not needed are empty.
std::tuple<Tensor, Tensor, Tensor> lsh_attention_backward(
    const Tensor& dout_, const Optional& dlse_, const Tensor& q, const Optional& k, const Tensor& v,
    const Tensor& out_, const Tensor& lse_, const Tensor& order, const Optional& buckets,
    const Optional& ranks, const Optional& mask, const Optional& seed, double dropout_p,
    int64_t chunk_length, double scale, c10::string_view key_norm, c10::string_view wrap,
    bool causal, bool attend_self, bool mask_queries, std::array<bool, 3> needs) {
  const Arguments arguments(q, k, v, order, buckets, ranks, mask, seed, dropout_p, chunk_length,
                            scale, key_norm, wrap, causal, attend_self, mask_queries);
  const auto& p = arguments.view;
  const int64_t sizes[] = {p.batch, p.heads, p.n, p.v_dim};
  const at::IntArrayRef rows(sizes, 3);
  const Tensor dout = dense_rows(dout_, "dout", q.scalar_type(), sizes),
               out = dense_rows(out_, "out", q.scalar_type(), sizes);
  const Tensor lse = checked_contiguous(lse_, "lse", at::kFloat, rows);
  const Tensor dlse = dlse_ ? checked_contiguous(*dlse_, "dlse", at::kFloat, rows) : Tensor();
  const auto make = [&](bool needed, const Tensor& like) {
    return needed ? empty_like(like, like.size(1), like.size(3)) : Tensor();
  };
  const bool needs_k = k && needs[1];
  Tensor dq = make(needs[0], q), dk = needs_k ? make(true, *k) : Tensor(), dv = make(needs[2], v);
  cpu::lsh_attention_backward(p, rows_of<const void>(dout),
                              dlse_ ? dlse.const_data_ptr<float>() : nullptr,
                              rows_of<const void>(out), lse.const_data_ptr<float>(),
                              {rows_of<void>(dq), rows_of<void>(dk), rows_of<void>(dv)});
  for (Tensor* grad : {&dq, &dk, &dv})
    if (!grad->defined()) *grad = at::empty({0}, q.options());
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("lsh_attention", lsh_attention);
  m.impl("lsh_attention_backward", lsh_attention_backward);
}

}  // namespace pyfast
