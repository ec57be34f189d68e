// AVX-512 (F, BW, DQ, VL); empty where the compiler targets another processor.
#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace dafl::cpu::avx512 {
static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace dafl::cpu::avx512

#define DAFL_ISA avx512
#define DAFL_VECTOR_BYTES 64
#define DAFL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define DAFL_AVX512_INTRINSICS
#include "kernels.inl"
#endif
