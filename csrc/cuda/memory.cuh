// What the kernels read and write: elements, fours of elements and rows in registers, of any dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../matrix.h"
#include "../row_math.h"

namespace dafl {
namespace cuda {

constexpr int kWarp = 32;

__device__ inline float lowest(float) { return -__builtin_huge_valf(); }
__device__ inline double lowest(double) { return -__builtin_huge_val(); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

template <class S>
__device__ S log_or_zero(S p) {
  return p == S(0) ? S(0) : log_of(p);
}

__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }

// 1 / x within 2 ulp, for 1 <= x < 2^126 and NaN: sums of exponentials. It needs no call to a slow
// path, around which registers would spill.
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }

// The compiler takes the value for a new one, and orders memory accesses around it: what it would
// otherwise share between loops or load ahead, all at once, does not fit the registers.
__device__ inline void keep_apart(float& value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(value)::"memory");
#else
  (void)value;
#endif
}

// ---- Memory ------------------------------------------------------------------------------------

__device__ inline float decode16(unsigned short bits, Dtype dtype) {
  return dtype == Dtype::bf16 ? __uint_as_float(static_cast<unsigned>(bits) << 16)
                              : __half2float(__ushort_as_half(bits));
}

__device__ inline unsigned short encode16(float value, Dtype dtype) {
  return dtype == Dtype::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                              : __half_as_ushort(__float2half_rn(value));
}

// One element, at an offset in elements.
template <class S>
__device__ S load(const void* data, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<S>(static_cast<const float*>(data)[offset]);
    case Dtype::f64:
      return static_cast<S>(static_cast<const double*>(data)[offset]);
    default:
      return static_cast<S>(decode16(static_cast<const unsigned short*>(data)[offset], dtype));
  }
}

template <class S>
__device__ S load(const Matrix& m, int64_t row, int64_t column) {
  return load<S>(m.data, m.dtype, row * m.row_stride + column * m.col_stride);
}

template <class S>
__device__ void store(void* data, Dtype dtype, int64_t offset, S value) {
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      break;
    case Dtype::f64:
      static_cast<double*>(data)[offset] = value;
      break;
    default:
      static_cast<unsigned short*>(data)[offset] = encode16(static_cast<float>(value), dtype);
  }
}

// The gradient of a total that autograd hands over; none: 1.
__device__ inline double upstream_of(const void* data, Dtype dtype) {
  return data == nullptr ? 1.0 : load<double>(data, dtype, 0);
}

// One number each.
template <class S, int n>
__device__ void store_scalars(const double (&values)[n], void* const* to) {
#pragma unroll
  for (int i = 0; i < n; ++i) *static_cast<S*>(to[i]) = static_cast<S>(values[i]);
}

// Whether `width` columns can be read in aligned fours: 16 bytes of fp32, 8 of bf16 or fp16.
__device__ inline bool has_quads(const Matrix& m, int64_t width) {
  const int64_t bytes = m.dtype == Dtype::f32 ? 16 : 8;
  return m.dtype != Dtype::f64 && m.col_stride == 1 && width % 4 == 0 && m.row_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % bytes == 0;
}

// Four elements at an offset that has_quads vouches for.
__device__ inline float4 load_quad(const void* data, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::f32) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + offset);
  }
  const ushort4 bits =
      *reinterpret_cast<const ushort4*>(static_cast<const unsigned short*>(data) + offset);
  return make_float4(decode16(bits.x, dtype), decode16(bits.y, dtype), decode16(bits.z, dtype),
                     decode16(bits.w, dtype));
}

__device__ inline void store_quad(void* data, Dtype dtype, int64_t offset, float4 v) {
  if (dtype == Dtype::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + offset) = v;
  } else {
    *reinterpret_cast<ushort4*>(static_cast<unsigned short*>(data) + offset) = make_ushort4(
        encode16(v.x, dtype), encode16(v.y, dtype), encode16(v.z, dtype), encode16(v.w, dtype));
  }
}

// A row in registers. A thread owns the columns first + 4 q kGroup + j, q < kQuads, j < 4, of
// those below `limit`; first is a multiple of 4, and neighbours' quads are neighbours.
template <int kGroup>
__device__ constexpr int column_of(int i, int first) {
  return first + i / 4 * (4 * kGroup) + i % 4;
}

struct Columns {
  int first, limit;
};

// Columns from the limit on read as -inf, which no maximum and no sum of exponentials sees. One
// dtype's loads stand together, so that all of them are under way before the first is used.
template <int kGroup, int kQuads>
__device__ void load_row(const Matrix& m, bool quads, int64_t row, Columns own,
                         float (&x)[4 * kQuads]) {
  const int64_t start = row * m.row_stride;
  if (quads && m.dtype == Dtype::f32) {
    const float* from = static_cast<const float*>(m.data) + start;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int column = column_of<kGroup>(4 * q, own.first);
      const float low = lowest(0.0f);
      float4 v = make_float4(low, low, low, low);
      if (column < own.limit) v = *reinterpret_cast<const float4*>(from + column);
      x[4 * q] = v.x;
      x[4 * q + 1] = v.y;
      x[4 * q + 2] = v.z;
      x[4 * q + 3] = v.w;
    }
  } else if (quads) {
    const unsigned short* from = static_cast<const unsigned short*>(m.data) + start;
    ushort4 bits[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int column = column_of<kGroup>(4 * q, own.first);
      bits[q] = make_ushort4(0, 0, 0, 0);
      if (column < own.limit) bits[q] = *reinterpret_cast<const ushort4*>(from + column);
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const bool in = column_of<kGroup>(4 * q, own.first) < own.limit;
      x[4 * q] = in ? decode16(bits[q].x, m.dtype) : lowest(0.0f);
      x[4 * q + 1] = in ? decode16(bits[q].y, m.dtype) : lowest(0.0f);
      x[4 * q + 2] = in ? decode16(bits[q].z, m.dtype) : lowest(0.0f);
      x[4 * q + 3] = in ? decode16(bits[q].w, m.dtype) : lowest(0.0f);
    }
  } else {
    // Any strides. One element after the other: addresses for all would not fit the registers.
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) {
      const int column = column_of<kGroup>(i, own.first);
      const int64_t offset = start + column * m.col_stride;
      x[i] = column < own.limit ? load<float>(m.data, m.dtype, offset) : lowest(0.0f);
      keep_apart(x[i]);
    }
  }
}

// Asks for a row that load_row will read next: it travels to the L2 cache while the current one is
// worked on, without taking registers.
template <int kGroup, int kQuads>
__device__ void prefetch_row(const Matrix& m, bool quads, int64_t row, Columns own) {
#ifdef __CUDA_ARCH__
  if (!quads) return;
  const char* from = static_cast<const char*>(m.data);
  const int size = m.dtype == Dtype::f32 ? 4 : 2;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int column = column_of<kGroup>(4 * q, own.first);
    const char* at = from + (row * m.row_stride + column) * size;
    if (column < own.limit) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
  }
#endif
}

// Into a contiguous [N, C] gradient.
template <int kGroup, int kQuads>
__device__ void store_row(void* grad, Dtype dtype, int64_t row, int C, Columns own,
                          const float (&x)[4 * kQuads]) {
  const int64_t start = row * C;
  const bool quads = C % 4 == 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int column = column_of<kGroup>(4 * q, own.first);
    if (quads) {
      if (column < own.limit) {
        store_quad(grad, dtype, start + column,
                   make_float4(x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < own.limit) store(grad, dtype, start + column + j, x[4 * q + j]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace dafl
