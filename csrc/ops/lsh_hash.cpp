// The CPU implementations of hashing by random directions and of sorting by hash.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>

#include "cpu/lsh/hash.h"
#include "ops/checks.h"

namespace pyfast {
namespace {

Tensor lsh_rotations(const Tensor& seed, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong && seed.numel() == 1, "seed is ",
                   seed.scalar_type(), " ", seed.sizes(), "; it must be one int64");
  Tensor result = at::empty(shape, seed.options().dtype(at::kFloat));
  cpu::lsh_rotations(uint64_t(seed.item<int64_t>()), result.numel(),
                     result.mutable_data_ptr<float>());
  return result;
}

Tensor lsh_hash(const Tensor& x, const Tensor& rotations, at::IntArrayRef factors) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(3) > 0, "x has shape ", x.sizes(),
                    "; it must be [batch, heads, n, dim]");
  int64_t width = 0, product = 1;
  for (int64_t factor : factors) {
    TORCH_CHECK_VALUE(factor >= 2 && factor % 2 == 0 && factor < (int64_t{1} << 31) / product,
                      "factors is ", factors, "; each must be even, their product below 2^31");
    width += factor / 2, product *= factor;
  }
  const auto fits = [&](int64_t i) {
    return rotations.size(i) == 1 || rotations.size(i) == x.size(i);
  };
  TORCH_CHECK_VALUE(!factors.empty() && rotations.dim() == 5 && fits(0) && fits(1) &&
                        rotations.size(2) == x.size(3) && rotations.size(4) == width,
                    "rotations has shape ", rotations.sizes(), "; it must be [1 or ", x.size(0),
                    ", 1 or ", x.size(1), ", ", x.size(3), ", rounds, ", width, "]");
  TORCH_CHECK_VALUE(x.is_cpu() && rotations.is_cpu(), "x and rotations must be on the CPU");
  const Tensor rows = x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
  const Tensor directions = rotations.to(at::kFloat).permute({0, 1, 3, 4, 2}).contiguous();
  const int64_t rounds = rotations.size(3);
  Tensor result = at::empty({x.size(0), x.size(1), rounds, x.size(2)}, x.options().dtype(at::kInt));
  cpu::lsh_hash({dtype_of(x.scalar_type(), "x"),
                 rows.const_data_ptr(),
                 {rows.stride(0), rows.stride(1), rows.stride(2)},
                 x.size(0),
                 x.size(1),
                 x.size(2),
                 x.size(3),
                 rounds,
                 directions.const_data_ptr<float>(),
                 rotations.size(0) > 1,
                 rotations.size(1) > 1,
                 factors.data(),
                 int64_t(factors.size())},
                result.mutable_data_ptr<int32_t>());
  return result;
}

std::tuple<Tensor, Tensor> lsh_sort(const Tensor& buckets, int64_t n_buckets) {
  TORCH_CHECK_TYPE(buckets.scalar_type() == at::kInt, "buckets is ", buckets.scalar_type(),
                   "; it must be int32");
  TORCH_CHECK_VALUE(buckets.dim() > 0 && buckets.size(-1) < (int64_t{1} << 31),
                    "buckets has shape ", buckets.sizes(), "; it must be [.., n], n below 2^31");
  TORCH_CHECK_VALUE(n_buckets > 0 && n_buckets < (int64_t{1} << 31), "n_buckets is ", n_buckets,
                    "; it must be positive and below 2^31");
  const Tensor rows = buckets.contiguous();
  Tensor order = at::empty(buckets.sizes(), buckets.options()),
         ranks = at::empty(buckets.sizes(), buckets.options());
  const bool in_range =
      cpu::lsh_sort(rows.const_data_ptr<int32_t>(), row_count(rows), rows.size(-1), n_buckets,
                    order.mutable_data_ptr<int32_t>(), ranks.mutable_data_ptr<int32_t>());
  TORCH_CHECK_VALUE(in_range, "buckets holds ids from ", rows.min().item<int32_t>(), " to ",
                    rows.max().item<int32_t>(), "; they must be 0 to ", n_buckets - 1);
  return {order, ranks};
}

}  // namespace

TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("lsh_rotations", lsh_rotations);
  m.impl("lsh_hash", lsh_hash);
  m.impl("lsh_sort", lsh_sort);
}

}  // namespace pyfast
