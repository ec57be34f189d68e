// NEON with BF16: the layers' bf16 kernels. Empty for other processors, and where the compiler does
// not know the instructions.
#include "instruction_set.h"

#if defined(__aarch64__) && __has_include(<arm_bf16.h>)
#include <arm_neon.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dafl::cpu::neon_bf16 {
static bool supported() {
#if defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which old headers do not have
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}
}  // namespace dafl::cpu::neon_bf16

#define DAFL_ISA neon_bf16
#define DAFL_VECTOR_BYTES 16
#define DAFL_TARGET "arch=armv8.2-a+bf16"
#define DAFL_ONLY_BF16
#define DAFL_NEON_BF16
#include "kernels.inl"
#endif
