// LSH attention on the CPU: raw pointers in, raw pointers out. Arguments are checked by the caller
// (lsh_attention_ops.cpp).
#pragma once

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

enum class KeyNorm { rms, l2, none };
enum class Wrap { rounds, round, none };

// [batch, heads, n, width]: rows without gaps, wherever they lie. Strides are in numbers.
template <class T>
struct Rows {
  T* at;
  int64_t heads, between_batches, between_heads, between;
};

struct LSHAttention {
  DType dtype;
  int64_t batch, heads, n, dim, v_dim, rounds, chunk;
  Rows<const void> q, k,
      v;  // k may be null: q. Heads of k and v may be shared, each by a group of q's
  const int32_t *order, *buckets,
      *ranks;           // [k ? 2 : 1, batch, heads, rounds, n]; the last two may be null
  const uint8_t* mask;  // [batch, n], or null; bytes of a bool tensor, which may be any
  uint64_t seed;        // of dropout,
  uint32_t threshold;   // as philox.h has it; 0: none
  float scale;
  KeyNorm key_norm;
  Wrap wrap;
  bool causal, attend_self, mask_queries;
};

// out[batch, heads, n, v_dim], lse[batch, heads, n]
void lsh_attention(const LSHAttention&, const Rows<void>& out, float* lse);

struct LSHGradients {
  Rows<void> q, k, v;  // null: not needed
};

// dlse may be null: zeros. Not null for k unless k is given.
void lsh_attention_backward(const LSHAttention&, const Rows<const void>& dout, const float* dlse,
                            const Rows<const void>& out, const float* lse, const LSHGradients&);

}  // namespace pyfast::cpu
