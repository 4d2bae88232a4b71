#include "cpu/common/products.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include "cpu/common/isa.h"
#include "cpu/common/scratch.h"

namespace pyfast::cpu {

// torch has no brgemm where oneDNN was left out, capped or turned off. Whether it has one shows in
// a trial.
bool multiplies_bf16(DType dtype) {
  static const bool has = [] {
    if (isa() < Isa::avx512_bf16) return false;
    constexpr int64_t kSide = 32;
    const Scratch zeros(2 * kSide * kSide);
    std::fill_n(zeros.of(0), 2 * kSide * kSide, 0.0f);
    const auto factor = reinterpret_cast<const at::BFloat16*>(zeros.of(0));
    try {
      at::native::cpublas::brgemm(kSide, kSide, kSide, kSide, kSide, kSide, false, factor, factor,
                                  zeros.of(0) + kSide * kSide);
    } catch (const std::exception&) {
      TORCH_WARN(
          "pyfast: torch has no bf16 products here (oneDNN left out, or capped by "
          "ONEDNN_MAX_CPU_ISA): they are done in float32, slowly");
      return false;
    }
    return true;
  }();
  return has && dtype == DType::bf16 && at::globalContext().userEnabledMkldnn();
}

}  // namespace pyfast::cpu
