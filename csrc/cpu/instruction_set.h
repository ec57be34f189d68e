// What each of baseline.cpp, avx2.cpp and so on gives to dispatch.cpp, which lists them.
#pragma once

#include "layers.h"
#include "losses.h"
#include "winograd.h"

// Those compiled here, each in the file of its name. Narrowest first: each takes from the one
// before it what it does not have itself.
#if defined(__x86_64__)
#define DAFL_INSTRUCTION_SETS(DO) DO(baseline) DO(avx2) DO(avx512) DO(avx512_bf16)
#elif defined(__aarch64__)
#if __has_include(<arm_bf16.h>)
#define DAFL_INSTRUCTION_SETS(DO) DO(neon) DO(neon_bf16)
#else  // a compiler without bf16 instructions
#define DAFL_INSTRUCTION_SETS(DO) DO(neon)
#endif
#else
#define DAFL_INSTRUCTION_SETS(DO) DO(baseline)
#endif

namespace dafl {
namespace cpu {

struct InstructionSet {
  const char* name;
  bool (*supported)();  // by this processor; asked only where all sets before it are

  // By Dtype: fp32, fp64, bf16, fp16; for the losses by compute type, fp32 and fp64. A null stands
  // for the kernels of the set before this one.
  const LossKernels* losses[2];
  const LayerKernels* layers[4];
  const WinogradKernels* winograd[4];

  bool winograd_pays[4];  // whether it is faster than a convolution without it
};

#define DAFL_DECLARE(name)                     \
  namespace name {                             \
  extern const InstructionSet instruction_set; \
  }
DAFL_INSTRUCTION_SETS(DAFL_DECLARE)
#undef DAFL_DECLARE

const char* isa();                   // the name of the chosen set: the widest, or DAFL_FAST_ISA
const char* const* isa_available();  // names this machine can run, null-terminated

}  // namespace cpu
}  // namespace dafl
