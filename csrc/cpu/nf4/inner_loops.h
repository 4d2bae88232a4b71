// Loops whose innermost step alone differs between instruction sets. Included after a file has
// switched its instruction set on; the anonymous namespace keeps each copy in its file.
#pragma once

#include "cpu/nf4/kernel_table.h"

namespace pyfast::cpu {
namespace {

// Decodes a run. Lookup<dtype> has a constructor Lookup(const Codebook&); scale(float), called once
// a block; and many(packed, to), which decodes 16 bytes to 32 elements.
template <class Lookup, DType dtype>
void decode_run(const PackedRun& run, typename Element<dtype>::type* to) {
  Lookup lookup(*run.code);
  const float* scale = run.scales;
  const int64_t end = run.begin + run.count;
  for (int64_t i = run.begin; i < end;) {
    int64_t stop = ((i >> run.block_shift) + 1) << run.block_shift;
    if (stop > end) stop = end;
    lookup.scale(*scale);
    if (i & 1) *to++ = Element<dtype>::narrow(run.code->value[nibble(run.packed, i++)] * *scale);
    for (; i + 32 <= stop; i += 32, to += 32) lookup.many(run.packed + i / 2, to);
    for (; i < stop; ++i)
      *to++ = Element<dtype>::narrow(run.code->value[nibble(run.packed, i)] * *scale);
    ++scale;
  }
}

template <template <DType> class Lookup>
void decode(DType dtype, const PackedRun& run, void* to) {
  switch (dtype) {
    case DType::f32:
      return decode_run<Lookup<DType::f32>, DType::f32>(run, static_cast<float*>(to));
    case DType::bf16:
      return decode_run<Lookup<DType::bf16>, DType::bf16>(run, static_cast<uint16_t*>(to));
    case DType::f16:
      return decode_run<Lookup<DType::f16>, DType::f16>(run, static_cast<uint16_t*>(to));
  }
}

}  // namespace
}  // namespace pyfast::cpu
