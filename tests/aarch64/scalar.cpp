// The kernels once more, for a processor without vector instructions: what check.cpp compares with.
// Compiled with -march=armv8-a+nosimd, where a "vector" is four values one after the other, so
// lanes and the order of all sums are those of NEON.
#include "cpu/instruction_set.h"

namespace dafl::cpu::scalar {
static bool supported() { return true; }
}  // namespace dafl::cpu::scalar

#define DAFL_ISA scalar
#define DAFL_VECTOR_BYTES 16
#define DAFL_WITH_F64
#include "cpu/kernels.inl"
