#include "cpu/lsh/loops.h"

namespace pyfast::cpu {

typedef float Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourPlaces{__VA_ARGS__})
#endif

}  // namespace pyfast::cpu

#define LOOPS "cpu/lsh/inner_loops.h"
#include "cpu/common/each_isa.h"

namespace pyfast::cpu {

const LSHLoops& lsh_loops() { return BEST(loops); }

}  // namespace pyfast::cpu
