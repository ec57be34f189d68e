// Any processor but ARM, which has neon.cpp: 128-bit vectors (SSE2), and the fp64 path for all.
#include "instruction_set.h"

#if !defined(__aarch64__)
namespace dafl::cpu::baseline {
static bool supported() { return true; }
}  // namespace dafl::cpu::baseline

#define DAFL_ISA baseline
#define DAFL_VECTOR_BYTES 16
#define DAFL_WITH_F64
#include "kernels.inl"
#endif
