// Loops in vectors of kLanes floats. Included by each_isa.h once for each instruction set, inside a
// namespace that defines kLanes and kRegisters: there are no guard and no includes. Builtins are
// used because functions of std may belong to another instruction set.

constexpr int kTileRows = 6,
              kTileVectors = kRegisters >= 32 ? 4 : 2;  // accumulators that fit in registers

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

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
void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool add) {
  Floats sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Floats right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = load(b + kLanes * j);
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
      float* to = c + i * ldc + kLanes * j;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
}

template <int rows, bool transposed>
void tile_row(int64_t width, int64_t depth, const float* a, int64_t lda, const float* b,
              int64_t ldb, float* c, int64_t ldc, bool add) {
  constexpr int64_t kWidest = kTileVectors * kLanes;
  for (; width >= kWidest; width -= kWidest, b += kWidest, c += kWidest)
    tile<rows, kTileVectors, transposed>(depth, a, lda, b, ldb, c, ldc, add);
  if constexpr (kTileVectors > 2) {
    if (width == 3 * kLanes) return tile<rows, 3, transposed>(depth, a, lda, b, ldb, c, ldc, add);
    if (width == 2 * kLanes) return tile<rows, 2, transposed>(depth, a, lda, b, ldb, c, ldc, add);
  }
  if (width > 0) tile<rows, 1, transposed>(depth, a, lda, b, ldb, c, ldc, add);
}

template <bool transposed>
void multiply(int64_t rows, int64_t width, int64_t depth, const float* a, int64_t lda,
              const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  static constexpr decltype(&tile_row<1, transposed>) rest[] = {
      tile_row<1, transposed>, tile_row<2, transposed>, tile_row<3, transposed>,
      tile_row<4, transposed>, tile_row<5, transposed>, tile_row<6, transposed>};
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t here = rows - i < kTileRows ? rows - i : kTileRows;
    rest[here - 1](width, depth, a + (transposed ? i : i * lda), lda, b, ldb, c + i * ldc, ldc,
                   add);
  }
}

// ---- rows

void transpose(const float* from, int64_t rows, int64_t cols, int64_t ld, float times, float* to,
               int64_t ldto) {
  const int64_t whole_rows = rows / 4 * 4, whole_cols = cols / 4 * 4;
  for (int64_t j = 0; j < whole_cols; j += 4)
    for (int64_t i = 0; i < whole_rows; i += 4) {
      Four x[4];
      for (int n = 0; n < 4; ++n) __builtin_memcpy(x + n, from + (i + n) * ld + j, sizeof(Four));
      const Four a = SHUFFLE(x[0], x[1], 0, 4, 1, 5), b = SHUFFLE(x[0], x[1], 2, 6, 3, 7);
      const Four c = SHUFFLE(x[2], x[3], 0, 4, 1, 5), d = SHUFFLE(x[2], x[3], 2, 6, 3, 7);
      x[0] = times * SHUFFLE(a, c, 0, 1, 4, 5), x[1] = times * SHUFFLE(a, c, 2, 3, 6, 7);
      x[2] = times * SHUFFLE(b, d, 0, 1, 4, 5), x[3] = times * SHUFFLE(b, d, 2, 3, 6, 7);
      for (int n = 0; n < 4; ++n) __builtin_memcpy(to + (j + n) * ldto + i, x + n, sizeof(Four));
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j)
      to[j * ldto + i] = times * from[i * ld + j];
}

inline float sum_of(Floats x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

inline float dot(const float* a, const float* b, int64_t width) {
  Floats sum = {};
  for (int64_t j = 0; j < width; j += kLanes) sum += load(a + j) * load(b + j);
  return sum_of(sum);
}

void normalize(const float* from, int64_t count, int64_t width, float add, float min_norm,
               float* to, float* inverse) {
  for (int64_t i = 0; i < count; ++i, from += width, to += width) {
    const float norm = __builtin_sqrtf(dot(from, from, width) + add);
    inverse[i] = 1 / (norm < min_norm ? min_norm : norm);
    for (int64_t j = 0; j < width; j += kLanes) store(to + j, inverse[i] * load(from + j));
  }
}

void normalize_backward(const float* rows, const float* inverse, int64_t count, int64_t width,
                        float min_norm, float* d) {
  for (int64_t i = 0; i < count; ++i, rows += width, d += width) {
    const float along = inverse[i] == 1 / min_norm ? 0 : dot(rows, d, width);
    for (int64_t j = 0; j < width; j += kLanes)
      store(d + j, inverse[i] * (load(d + j) - along * load(rows + j)));
  }
}

void add_rows(const int32_t* places, int64_t count, const float* rows, int64_t ld, int64_t width,
              float* to, int64_t ldto) {
  for (int64_t i = 0; i < count; ++i, rows += ld) {
    float* row = to + places[i] * ldto;
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) store(row + j, load(row + j) + load(rows + j));
    for (; j < width; ++j) row[j] += rows[j];
  }
}

// ---- which keys a query sees

void count_below(const int32_t* all, int64_t n, const int32_t* x, int64_t size, int32_t* count) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const Ints value = load(x + i);
    Ints total = {};
    for (int64_t j = 0; j < n; ++j) total -= all[j] < value;
    __builtin_memcpy(count + i, &total, sizeof(total));
  }
}

// ---- softmax

constexpr float kMinusInfinity = -__builtin_inff();

// Returns 2^x for x <= 127, 0 below -126, and NaN for NaN.
inline Floats power_of_2(Floats x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23; adding it rounds to an integer
  const Floats shifted = x + kShift, f = x - (shifted - kShift);
  const Floats rest =
      ((((1.535336206e-4f * f + 1.339887459e-3f) * f + 9.618437358e-3f) * f + 5.550332471e-2f) * f +
       2.402264791e-1f) *
          f +
      6.931472029e-1f;
  const Ints bits = (Ints)(rest * f + 1.0f) + ((Ints)shifted << 23);
  const Floats power = x < -126.0f ? Floats{} : (Floats)bits;
  return x != x ? x : power;
}

// Returns 2^(score - lse), but at most 1, whatever was rounded off of large scores.
inline Floats weight(Floats score, Floats lse) {
  const Floats x = score - lse;
  return power_of_2(x > 0.0f ? Floats{} : x);
}

inline Ints sees(const Scores& s, int64_t row, Ints limit, Ints self) {
  return (s.keys[row] < limit) & (s.keys[row] != self);
}

// Clears what is below a staircase, since products may read as far as the next columns reach.
inline void clear_below(const Scores& s, const Scores::Part& part, int64_t g, float* to) {
  for (int64_t j = part.heights[g]; j < part.heights[g + 1]; ++j)
    store(to + (part.first + j) * s.ld + g * kLanes, Floats{});
}

void softmax(const Scores& s, float* most, float* sum) {
  for (int64_t g = 0; g * kLanes < s.columns; ++g) {
    float* column = s.data + g * kLanes;
    const Ints limit = load(s.limits + g * kLanes), self = load(s.self + g * kLanes);
    Floats top = load(most + g * kLanes), total = {};
    for (const auto& part : s.parts)
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        Floats x = load(column + row * s.ld);
        x = sees(s, row, limit, self) ? x : Floats{} + kMinusInfinity;
        top = x > top ? x : top;
        store(column + row * s.ld, x);
      }
    for (const auto& part : s.parts) {
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        const Floats p = power_of_2(load(column + row * s.ld) - top);
        total += p;
        store(column + row * s.ld, p);
      }
      clear_below(s, part, g, s.data);
    }
    store(most + g * kLanes, top);
    store(sum + g * kLanes, total);
  }
}

void softmax_backward(const Scores& s, const float* lse, const float* delta, float scale,
                      float* dp) {
  for (int64_t g = 0; g * kLanes < s.columns; ++g) {
    const Ints limit = load(s.limits + g * kLanes), self = load(s.self + g * kLanes);
    const Floats shift = load(lse + g * kLanes), less = load(delta + g * kLanes);
    for (const auto& part : s.parts) {
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        const int64_t at = row * s.ld + g * kLanes;
        const Floats p = sees(s, row, limit, self) ? weight(load(s.data + at), shift) : Floats{};
        store(s.data + at, p);
        store(dp + at, scale * p * (load(dp + at) - less));
      }
      clear_below(s, part, g, s.data);
      clear_below(s, part, g, dp);
    }
  }
}

void probabilities(const Scores& s, const float* lse) {
  for (int64_t g = 0; g * kLanes < s.columns; ++g) {
    const Ints limit = load(s.limits + g * kLanes), self = load(s.self + g * kLanes);
    const Floats shift = load(lse + g * kLanes);
    for (const auto& part : s.parts) {
      for (int64_t row = part.first; row < part.first + part.heights[g]; ++row) {
        float* x = s.data + row * s.ld + g * kLanes;
        store(x, sees(s, row, limit, self) ? weight(load(x), shift) : Floats{});
      }
      clear_below(s, part, g, s.data);
    }
  }
}

constexpr LSHLoops loops = {kLanes,      kTileRows, multiply<false>,    multiply<true>,
                            transpose,   normalize, normalize_backward, add_rows,
                            count_below, softmax,   softmax_backward,   probabilities};
