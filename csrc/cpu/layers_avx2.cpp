// The layers' kernels for AVX2 with FMA, empty where the compiler targets another processor.
// Every include that is not ours comes before the pragma: see kernels.inl.
#include "layer_kernels.h"
#include "winograd_kernels.h"

#if defined(__x86_64__)
#define DAFL_ISA avx2
#define DAFL_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "../row_math.h"
#include "layers.inl"
#include "winograd.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
