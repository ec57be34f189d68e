// The layers' kernels for any processor: 128-bit vectors (SSE2, NEON), and the fp64 path.
#include "layer_kernels.h"
#include "winograd_kernels.h"

#define DAFL_ISA baseline
#define DAFL_VECTOR_BYTES 16
#define DAFL_WITH_F64
#include "../row_math.h"
#include "layers.inl"
#include "winograd.inl"
