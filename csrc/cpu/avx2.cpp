// AVX2 with FMA; empty where the compiler targets another processor.
#include "instruction_set.h"

#if defined(__x86_64__)
namespace dafl::cpu::avx2 {
static bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace dafl::cpu::avx2

#define DAFL_ISA avx2
#define DAFL_VECTOR_BYTES 32
#define DAFL_TARGET "avx2,fma"
#include "kernels.inl"
#endif
