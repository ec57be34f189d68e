// Layers of the networks as operators of dafl_fast, computed on the CPU with less work and fewer
// passes over memory than layer by layer; the same values up to rounding. Each file here implements
// one, and ends with its schema and registration.
//
// Activations x are fp32, bf16, fp16 or fp64. Parameters are of any of these types: they are
// rounded to the activations' dtype where matrices are multiplied, and their gradients have their
// own dtype. "Statistics dtype" is fp32, or fp64 where x is. There is no second derivative, and
// none in forward mode. Results do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace dafl {

// Whether conv3x3 (winograd.cpp) is faster on this processor, for many channels, than torch's
// convolution.
bool conv3x3_pays(at::ScalarType dtype);

}  // namespace dafl
