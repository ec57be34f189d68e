// NEON, which every 64-bit ARM processor has, and the fp64 path there; empty for other processors.
#include "instruction_set.h"

#if defined(__aarch64__)
namespace dafl::cpu::neon {
static bool supported() { return true; }
}  // namespace dafl::cpu::neon

#define DAFL_ISA neon
#define DAFL_VECTOR_BYTES 16
#define DAFL_WITH_F64
#include "kernels.inl"
#endif
