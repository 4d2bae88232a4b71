// Loops without branches, so that compilers vectorize them. Included by each_isa.h once for each
// instruction set, inside a namespace: there are no guard and no includes. Builtins are used
// because functions of std may belong to another instruction set.

// e^x = power * rest + power, with power = 2^n and rest = e^r - 1 for |r| <= ln(2) / 2. An x beyond
// +-87 counts as +-87.
struct Exponential {
  float power, rest;

  explicit Exponential(float x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23; adding it rounds to an integer
    constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f,
                    kLn2Low = 1.42860677e-6f;  // their sum is ln 2
    x = x < -87.0f ? -87.0f : x;               // a NaN stays one
    x = x > 87.0f ? 87.0f : x;
    const float shifted = x * kLog2E + kShift, n = shifted - kShift;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    const float q =
        (((1.39454345e-3f * r + 8.36603623e-3f) * r + 4.16662991e-2f) * r + 1.66665480e-1f) * r +
        0.5f;
    rest = r * r * q + r;
    power = float_of((bits_of(shifted) + 127) << 23);
  }
  float value() const { return power * rest + power; }
  float less_one() const { return power * rest + (power - 1); }
};

inline float logistic(float x) { return 1 / (1 + Exponential(-x).value()); }

inline float hyperbolic_tangent(float x) {
  const float e = Exponential(2 * __builtin_fabsf(x)).less_one();
  return __builtin_copysignf(e / (e + 2), x);
}

// The normal distribution: its density, and P(X <= x) = density * Mills' ratio, a polynomial of 1 /
// (1 + 0.35 |x|).
struct Normal {
  float density, below;

  explicit Normal(float x) {
    const float size = __builtin_fabsf(x), u = 1 / (1 + 0.35f * size),
                e = Exponential(-0.5f * size * size).value();
    float p = 3.24313864e-2f * u - 1.26281127e-1f;
    p = ((p * u + 9.52726454e-2f) * u + 1.33092165e-1f) * u + 6.62788153e-2f;
    p = ((p * u + 1.64093643e-1f) * u + 1.34748265e-1f) * u + 3.64203181e-4f;
    density = 0.398942280f * e;
    below = x < 0 ? p * e : 1 - p * e;
  }
};

struct GeluTanh {
  static constexpr float kRoot = 0.797884561f, kCubic = 0.044715f;  // sqrt(2 / pi)
  static float inner(float x) { return hyperbolic_tangent(kRoot * (x + kCubic * x * x * x)); }
};

template <Activation>
struct Function;

template <>
struct Function<Activation::relu> {
  static float value(float x) { return x <= 0 ? 0.0f : x; }  // NaN for NaN
  static float chain(float x, float d) { return x <= 0 ? 0.0f : d; }
};

template <>
struct Function<Activation::gelu> {
  static float value(float x) { return x * Normal(x).below; }
  static float chain(float x, float d) {
    const Normal normal(x);
    return d * (normal.below + x * normal.density);
  }
};

template <>
struct Function<Activation::gelu_tanh> {
  static float value(float x) { return 0.5f * x * (1 + GeluTanh::inner(x)); }
  static float chain(float x, float d) {
    const float t = GeluTanh::inner(x),
                d_inner = GeluTanh::kRoot * (1 + 3 * GeluTanh::kCubic * x * x);
    return d * 0.5f * ((1 + t) + x * (1 - t * t) * d_inner);
  }
};

template <>
struct Function<Activation::silu> {
  static float value(float x) { return x * logistic(x); }
  static float chain(float x, float d) {
    const float s = logistic(x);
    return d * s * (1 + x * (1 - s));
  }
};

template <>
struct Function<Activation::tanh> {
  static float value(float x) { return hyperbolic_tangent(x); }
  static float chain(float x, float d) {
    const float t = hyperbolic_tangent(x);
    return d * (1 - t * t);
  }
};

// h = scaling * act(z)
template <Activation activation>
void activate_all(const float* z, int64_t count, float scaling, float* h) {
  for (int64_t i = 0; i < count; ++i) h[i] = scaling * Function<activation>::value(z[i]);
}

// dz = scaling * dh * act'(z)
template <Activation activation>
void chain_all(const float* z, const float* dh, int64_t count, float scaling, float* dz) {
  for (int64_t i = 0; i < count; ++i) dz[i] = Function<activation>::chain(z[i], scaling * dh[i]);
}

void activate(Activation activation, const float* z, int64_t count, float scaling, float* h) {
  switch (activation) {
    case Activation::relu: return activate_all<Activation::relu>(z, count, scaling, h);
    case Activation::gelu: return activate_all<Activation::gelu>(z, count, scaling, h);
    case Activation::gelu_tanh: return activate_all<Activation::gelu_tanh>(z, count, scaling, h);
    case Activation::silu: return activate_all<Activation::silu>(z, count, scaling, h);
    case Activation::tanh: return activate_all<Activation::tanh>(z, count, scaling, h);
  }
}

void chain(Activation activation, const float* z, const float* dh, int64_t count, float scaling,
           float* dz) {
  switch (activation) {
    case Activation::relu: return chain_all<Activation::relu>(z, dh, count, scaling, dz);
    case Activation::gelu: return chain_all<Activation::gelu>(z, dh, count, scaling, dz);
    case Activation::gelu_tanh: return chain_all<Activation::gelu_tanh>(z, dh, count, scaling, dz);
    case Activation::silu: return chain_all<Activation::silu>(z, dh, count, scaling, dz);
    case Activation::tanh: return chain_all<Activation::tanh>(z, dh, count, scaling, dz);
  }
}
