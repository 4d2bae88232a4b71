// LSH attention on the CPU: raw pointers in, raw pointers out. Arguments are checked by the caller
// (lsh_attention_ops.cpp).
#pragma once

#include "nf4.h"

namespace pyfast::cpu {

enum class KeyNorm { rms, l2, none };
enum class Wrap { rounds, round, none };

struct LSHAttention {
  DType dtype;
  int64_t batch, heads, k_heads, v_heads, n, dim, v_dim, rounds, chunk;
  const void *q, *k, *v;                   // [batch, heads, n, dim], [batch, k_heads, n, dim] or null: q, and v's
  const int32_t *order, *buckets, *ranks;  // [k ? 2 : 1, batch, heads, rounds, n]; the last two may be null
  const uint8_t* mask;                     // [batch, n], or null; bytes of a bool tensor, which may be any
  uint64_t seed;                           // of dropout,
  uint32_t threshold;                      // as philox.h has it; 0: none
  float scale;
  KeyNorm key_norm;
  Wrap wrap;
  bool causal, attend_self, mask_queries;
};

// out[batch, heads, n, v_dim], lse[batch, heads, n]
void lsh_attention(const LSHAttention&, void* out, float* lse);

struct LSHGradients {
  void *q, *k, *v;  // null: not needed
};

// dlse may be null: zeros. Not null for k unless k is given.
void lsh_attention_backward(const LSHAttention&, const void* dout, const float* dlse, const void* out, const float* lse,
                            const LSHGradients&);

}  // namespace pyfast::cpu
