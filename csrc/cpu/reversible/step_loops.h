// Included by each_isa.h once for each instruction set, so that compilers vectorize the loops for
// it. `sign` is 1 or -1. Contracting a product and a sum to an FMA changes nothing, since every
// product here is exact.

void add_plain(float* stream, const float* out, int64_t count, float sign) {
  for (int64_t i = 0; i < count; ++i) stream[i] += sign * out[i];
}

// Returns whether a sum left the grid. If x and y = x + r are inside, x + r was exact. NaN counts
// as outside.
bool add_grid(float* stream, const float* out, int64_t count, float sign, float scale) {
  const float unit = 1 / scale, bound = 16777216.0f * unit;
  int32_t has_left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float y = stream[i] + sign * (__builtin_rintf(out[i] * scale) * unit);
    has_left |= !(__builtin_fabsf(y) < bound);
    stream[i] = y;
  }
  return has_left != 0;
}

// Returns whether a sum wrapped around, or a summand was no int32. Such a summand counts as the
// nearest int32, and NaN as 0.
bool add_fixed(int32_t* stream, const float* out, int64_t count, float sign, float scale) {
  constexpr float kMostUnits = 2147483520.0f;  // the largest float below 2^31
  int32_t has_left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float units = sign * __builtin_rintf(out[i] * scale);
    has_left |= !(__builtin_fabsf(units) <= kMostUnits);
    float inside = units == units ? units : 0;
    inside = inside < -kMostUnits ? -kMostUnits : inside;
    inside = inside > kMostUnits ? kMostUnits : inside;
    const int32_t x = stream[i], r = int32_t(inside), y = int32_t(uint32_t(x) + uint32_t(r));
    has_left |= ((x ^ y) & (r ^ y)) < 0;
    stream[i] = y;
  }
  return has_left != 0;
}
