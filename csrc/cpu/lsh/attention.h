// LSH attention on the CPU. The caller checks all arguments (ops/lsh_attention.cpp).
#pragma once

#include "cpu/common/dtype.h"

namespace pyfast::cpu {

enum class KeyNorm { rms, l2, none };
enum class Wrap { rounds, round, none };

// An array [batch, heads, n, width] whose rows have no gaps. Strides are in elements.
template <class T>
struct HeadRows {
  T* data;
  int64_t heads, batch_stride, head_stride, row_stride;
};

struct LSHAttention {
  DType dtype;
  int64_t batch, heads, n, dim, v_dim, rounds, chunk;
  // k may be null, which means q. A head of k or v may be shared by a group of q's heads.
  HeadRows<const void> q, k, v;
  // [k ? 2 : 1, batch, heads, rounds, n]; buckets and ranks may be null.
  const int32_t *order, *buckets, *ranks;
  const uint8_t*
      mask;       // [batch, n], or null; a byte of a bool tensor may have any value but 0 for true
  uint64_t seed;  // of dropout
  uint32_t threshold;  // of dropout, see philox.h; 0: none
  float scale;
  KeyNorm key_norm;
  Wrap wrap;
  bool causal, attend_self, mask_queries;
};

// Computes out[batch, heads, n, v_dim] and lse[batch, heads, n].
void lsh_attention(const LSHAttention&, const HeadRows<void>& out, float* lse);

struct LSHGradients {
  HeadRows<void> q, k, v;  // null if not needed
};

// Computes the gradients. dlse may be null, which means zeros. The gradient of k must be null
// unless k is given.
void lsh_attention_backward(const LSHAttention&, const HeadRows<const void>& dout,
                            const float* dlse, const HeadRows<const void>& out, const float* lse,
                            const LSHGradients&);

}  // namespace pyfast::cpu
