// Included once for each instruction set, inside a namespace, so that compilers vectorize the loops
// for it. `sign` is 1 or -1. Contracting a product and a sum changes nothing: every product here is
// exact.

void add_plain(float* stream, const float* out, int64_t count, float sign) {
  for (int64_t i = 0; i < count; ++i) stream[i] += sign * out[i];
}

// Whether a sum left the grid. With x and y = x + r inside it, x + r was exact; NaN is outside.
bool add_grid(float* stream, const float* out, int64_t count, float sign, float scale) {
  const float unit = 1 / scale, bound = 16777216.0f * unit;
  int32_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float y = stream[i] + sign * (__builtin_rintf(out[i] * scale) * unit);
    left |= !(__builtin_fabsf(y) < bound);
    stream[i] = y;
  }
  return left != 0;
}

// Whether a sum wrapped around, or a summand was no int32; it then counts as the nearest, NaN as 0.
bool add_fixed(int32_t* stream, const float* out, int64_t count, float sign, float scale) {
  constexpr float most = 2147483520.0f;  // the largest float below 2^31
  int32_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float units = sign * __builtin_rintf(out[i] * scale);
    left |= !(__builtin_fabsf(units) <= most);
    float inside = units == units ? units : 0;
    inside = inside < -most ? -most : inside;
    inside = inside > most ? most : inside;
    const int32_t x = stream[i], r = int32_t(inside), y = int32_t(uint32_t(x) + uint32_t(r));
    left |= ((x ^ y) & (r ^ y)) < 0;
    stream[i] = y;
  }
  return left != 0;
}
