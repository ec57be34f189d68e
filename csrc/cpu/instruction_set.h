// What each of baseline.cpp, avx2.cpp and so on gives to dispatch.cpp, which lists them.
#pragma once

#include "layers.h"
#include "losses.h"
#include "winograd.h"

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

const char* isa();                   // the name of the chosen set: the widest, or DAFL_FAST_ISA
const char* const* isa_available();  // names this machine can run, null-terminated

}  // namespace cpu
}  // namespace dafl
