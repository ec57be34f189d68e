// How the kernels see a tensor: torch-free, the same for the CPU and CUDA.
#pragma once

#include <cstdint>

// A function for the CPU's and for the GPU's kernels alike.
#if defined(__CUDACC__)
#define DAFL_HD __host__ __device__ __forceinline__
#else
#define DAFL_HD inline __attribute__((always_inline))
#endif

namespace dafl {

enum class Dtype { f32, f64, bf16, f16 };

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

struct Matrix {
  const void* data;
  int64_t row_stride;  // in elements, like col_stride
  int64_t col_stride;
  Dtype dtype;
};

}  // namespace dafl
