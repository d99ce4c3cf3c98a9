// The kernels compiled for AVX-512.
#if defined(__x86_64__)
#define GKD_ISA isa_avx512
#define GKD_VECTOR_BYTES 64
#define GKD_BFLOAT16
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include "kernels.inc"

namespace gkd {
extern const InstructionSet avx512 = {"avx512", GKD_KERNELS(float), GKD_KERNELS(double)};
}  // namespace gkd

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
