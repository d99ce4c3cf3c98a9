// The kernels compiled for AVX2.
#if defined(__x86_64__)
#define GKD_ISA isa_avx2
#define GKD_VECTOR_BYTES 32
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels.inc"

namespace gkd {
extern const InstructionSet avx2 = {"avx2", GKD_KERNELS(float), GKD_KERNELS(double)};
}  // namespace gkd

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
