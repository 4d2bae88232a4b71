// Included by each_isa.h once for each instruction set, so that compilers vectorize the loop for
// it.

// Finds for each of kBlock tokens which direction has the largest and which the smallest product.
// The products [count][kBlock] are of `count` directions, the first being number `first`.
void nearest(const float* products, int64_t count, int32_t first, Nearest& best) {
  for (int64_t i = 0; i < count; ++i) {
    const float* row = products + i * kBlock;
    const int32_t here = first + int32_t(i);
    for (int64_t l = 0; l < kBlock; ++l) {
      const bool above = row[l] > best.high[l], below = row[l] < best.low[l];
      best.high[l] = above ? row[l] : best.high[l];
      best.highest[l] = above ? here : best.highest[l];
      best.low[l] = below ? row[l] : best.low[l];
      best.lowest[l] = below ? here : best.lowest[l];
    }
  }
}
