// The arithmetic of reversible streams as an op, on the CPU and, if nvcc built it, on CUDA.
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <cmath>

#include "cpu/reversible/step.h"
#include "ops/checks.h"

#ifdef PYFAST_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/reversible.h"
#endif

namespace pyfast {
namespace {

void check_like(const Tensor& tensor, const char* name, const Tensor& stream) {
  TORCH_CHECK_VALUE(tensor.sizes() == stream.sizes() && tensor.device() == stream.device(), name,
                    " is ", tensor.sizes(), " on ", tensor.device(), "; it must be as stream, ",
                    stream.sizes(), " on ", stream.device());
}

// Returns the tensor with the strides of `like`, except in dimensions of size 1, where they do not
// matter.
Tensor with_layout_of(const Tensor& tensor, const Tensor& like) {
  bool same = true;
  for (int64_t i = 0; i < like.dim(); ++i)
    same &= like.size(i) < 2 || tensor.stride(i) == like.stride(i);
  if (same) return tensor;
  return at::empty_strided(like.sizes(), like.strides(), tensor.options()).copy_(tensor);
}

struct Arguments {
  Tensor out;
  cpu::ReversibleStep step{};

  Arguments(const Tensor& stream, const Tensor& out_, bool subtract, int64_t bits,
            const Tensor& flag) {
    const bool fixed = stream.scalar_type() == at::kInt, grid = !fixed && bits >= 0;
    TORCH_CHECK_VALUE(bits >= (fixed ? 0 : -1) && bits <= (fixed ? 30 : 23), "bits is ", bits,
                      " for a stream of ", stream.scalar_type(),
                      "; it must be -1, none, 0 to 23, or 0 to 30 for an int32 stream");
    TORCH_CHECK_TYPE(!grid || stream.scalar_type() == at::kFloat, "stream is ",
                     stream.scalar_type(), "; with bits it must be float32 or int32");
    TORCH_CHECK_VALUE(stream.is_non_overlapping_and_dense(), "stream has strides ",
                      stream.strides(), "; it must be dense");
    TORCH_CHECK_VALUE(
        flag.scalar_type() == at::kInt && flag.numel() == 1 && flag.device() == stream.device(),
        "flag is ", flag.scalar_type(), " ", flag.sizes(), "; it must be one int32 beside stream");
    check_like(out_, "out", stream);
    out = with_layout_of(out_, stream);
    step.stream_type = fixed  ? cpu::StreamType::fixed
                       : grid ? cpu::StreamType::grid
                              : cpu::StreamType::plain;
    step.dtype = fixed ? cpu::DType::f32 : dtype_of(stream.scalar_type(), "stream");
    step.out_dtype = dtype_of(out.scalar_type(), "out");
    step.stream = stream.mutable_data_ptr(), step.out = out.const_data_ptr();
    step.count = stream.numel(), step.scale = std::ldexp(1.0f, int(std::max<int64_t>(bits, 0)));
    step.subtract = subtract;
  }
};

// Does the step in float64 and returns true if the stream is float64. No kernel computes in
// float64; gradcheck needs it.
bool step_in_double(Tensor& stream, const Tensor& out, bool subtract) {
  if (stream.scalar_type() != at::kDouble) return false;
  check_like(out, "out", stream);
  stream.add_(out, subtract ? -1 : 1);
  return true;
}

void reversible_step(Tensor& stream, const Tensor& out, bool subtract, int64_t bits, Tensor& flag) {
  if (step_in_double(stream, out, subtract)) return;
  const Arguments arguments(stream, out, subtract, bits, flag);
  auto* worst = flag.mutable_data_ptr<int32_t>();
  *worst = std::max<int32_t>(*worst, cpu::reversible_step(arguments.step));
}

}  // namespace

TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("reversible_step", reversible_step); }

#ifdef PYFAST_CUDA
namespace {

void reversible_step_cuda(Tensor& stream, const Tensor& out, bool subtract, int64_t bits,
                          Tensor& flag) {
  const c10::cuda::CUDAGuard guard(stream.device());
  if (step_in_double(stream, out, subtract)) return;
  const Arguments arguments(stream, out, subtract, bits, flag);
  C10_CUDA_CHECK(cuda::reversible_step(arguments.step, flag.mutable_data_ptr<int32_t>(),
                                       c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("reversible_step", reversible_step_cuda); }
#endif

}  // namespace pyfast
