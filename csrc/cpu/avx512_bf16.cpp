// AVX-512 with BF16: the layers' bf16 kernels. Empty where the compiler targets another processor.
#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace dafl::cpu::avx512_bf16 {
static bool supported() { return __builtin_cpu_supports("avx512bf16"); }
}  // namespace dafl::cpu::avx512_bf16

#define DAFL_ISA avx512_bf16
#define DAFL_VECTOR_BYTES 64
#define DAFL_TARGET "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define DAFL_ONLY_BF16
#define DAFL_AVX512_BF16
#include "kernels.inl"
#endif
