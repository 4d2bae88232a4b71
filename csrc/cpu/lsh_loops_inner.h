// The loops, in vectors of `lanes` floats. Included once for each instruction set, inside a namespace that says how
// many lanes and registers there are: no guard and no includes; and builtins, as functions of std may belong to another
// instruction set.

constexpr int tile_rows = 6, tile_vectors = registers >= 32 ? 4 : 2;  // accumulators, in registers

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));

inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

inline Ints load(const int32_t* from) {
  Ints x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

inline void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof(x)); }

// ---- products

template <int rows, int vectors, bool transposed>
void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Floats sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Floats right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = load(b + lanes * j);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const float left = transposed ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * ldc + lanes * j;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
}

template <int rows, bool transposed>
void tile_row(int64_t width, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  constexpr int64_t widest = tile_vectors * lanes;
  for (; width >= widest; width -= widest, b += widest, c += widest)
    tile<rows, tile_vectors, transposed>(depth, a, lda, b, ldb, c, ldc, add);
  if (tile_vectors > 2 && width >= 2 * lanes) {
    tile<rows, 2, transposed>(depth, a, lda, b, ldb, c, ldc, add);
    width -= 2 * lanes, b += 2 * lanes, c += 2 * lanes;
  }
  if (width > 0) tile<rows, 1, transposed>(depth, a, lda, b, ldb, c, ldc, add);
}

template <bool transposed>
void multiply(int64_t rows, int64_t width, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc, bool add) {
  static constexpr decltype(&tile_row<1, transposed>) rest[] = {tile_row<1, transposed>, tile_row<2, transposed>,
                                                                tile_row<3, transposed>, tile_row<4, transposed>,
                                                                tile_row<5, transposed>, tile_row<6, transposed>};
  for (int64_t i = 0; i < rows; i += tile_rows) {
    const int64_t here = rows - i < tile_rows ? rows - i : tile_rows;
    rest[here - 1](width, depth, a + (transposed ? i : i * lda), lda, b, ldb, c + i * ldc, ldc, add);
  }
}

void transpose(const float* from, int64_t rows, int64_t cols, int64_t ld, float times, float* to, int64_t ldto) {
  constexpr int64_t side = 8;
  for (int64_t i0 = 0; i0 < rows; i0 += side)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = i0; i < (i0 + side < rows ? i0 + side : rows); ++i) to[j * ldto + i] = times * from[i * ld + j];
}

void count_below(const int32_t* all, int64_t n, const int32_t* x, int64_t size, int32_t* count) {
  for (int64_t i = 0; i < size; i += lanes) {
    const Ints value = load(x + i);
    Ints found = {};
    for (int64_t j = 0; j < n; ++j) found -= all[j] < value;
    __builtin_memcpy(count + i, &found, sizeof(found));
  }
}

// ---- softmax

constexpr float nothing = -__builtin_inff();

// 2^x for x <= 127; below -126, 0.
inline Floats power_of_2(Floats x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: what is added is rounded
  const Floats shifted = x + shift, f = x - (shifted - shift);
  const Floats rest =
      ((((1.535336206e-4f * f + 1.339887459e-3f) * f + 9.618437358e-3f) * f + 5.550332471e-2f) * f + 2.402264791e-1f) *
          f +
      6.931472029e-1f;
  const Ints bits = (Ints)(rest * f + 1.0f) + ((Ints)shifted << 23);
  return x < -126.0f ? Floats{} : (Floats)bits;
}

inline Ints sees(const Scores& s, int64_t row, Ints limit, Ints self) {
  return (s.keys[row] < limit) & (s.keys[row] != self);
}

// Below a staircase, products may read as far as the next columns reach.
inline void clear_below(const Scores& s, const Scores::Part& part, int64_t g, float* to) {
  for (int64_t j = part.heights[g]; j < part.heights[g + 1]; ++j)
    store(to + (part.first + j) * s.ld + g * lanes, Floats{});
}

void softmax(const Scores& s, float* most, float* sum) {
  for (int64_t g = 0; g * lanes < s.columns; ++g) {
    float* column = s.at + g * lanes;
    const Ints limit = load(s.limits + g * lanes), self = load(s.self + g * lanes);
    Floats top = load(most + g * lanes), total = {};
    for (const auto& part : s.parts)
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        Floats x = load(column + row * s.ld);
        x = sees(s, row, limit, self) ? x : Floats{} + nothing;
        top = x > top ? x : top;
        store(column + row * s.ld, x);
      }
    for (const auto& part : s.parts) {
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        const Floats p = power_of_2(load(column + row * s.ld) - top);
        total += p;
        store(column + row * s.ld, p);
      }
      clear_below(s, part, g, s.at);
    }
    store(most + g * lanes, top);
    store(sum + g * lanes, total);
  }
}

void softmax_backward(const Scores& s, const float* lse, const float* delta, float scale, float* dp) {
  for (int64_t g = 0; g * lanes < s.columns; ++g) {
    const Ints limit = load(s.limits + g * lanes), self = load(s.self + g * lanes);
    const Floats shift = load(lse + g * lanes), less = load(delta + g * lanes);
    for (const auto& part : s.parts) {
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        const int64_t at = row * s.ld + g * lanes;
        const Floats p = sees(s, row, limit, self) ? power_of_2(load(s.at + at) - shift) : Floats{};
        store(s.at + at, p);
        store(dp + at, scale * p * (load(dp + at) - less));
      }
      clear_below(s, part, g, s.at);
      clear_below(s, part, g, dp);
    }
  }
}

void probabilities(const Scores& s, const float* lse) {
  for (int64_t g = 0; g * lanes < s.columns; ++g) {
    const Ints limit = load(s.limits + g * lanes), self = load(s.self + g * lanes);
    const Floats shift = load(lse + g * lanes);
    for (const auto& part : s.parts) {
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        float* x = s.at + row * s.ld + g * lanes;
        store(x, sees(s, row, limit, self) ? power_of_2(load(x) - shift) : Floats{});
      }
      clear_below(s, part, g, s.at);
    }
  }
}

constexpr LSHLoops loops = {lanes,       tile_rows, multiply<false>,  multiply<true>, transpose,
                            count_below, softmax,   softmax_backward, probabilities};
