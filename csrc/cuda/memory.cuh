// What the kernels read and write: single elements of any dtype and strides, and 16 bytes at a time
// of one dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "../matrix.h"
#include "../row_math.h"

namespace dafl {
namespace cuda {

constexpr int kWarp = 32;

__device__ inline double lowest(double) { return -__builtin_huge_val(); }
__device__ inline float lowest(float) { return -__builtin_huge_valf(); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }

template <class S>
__device__ S log_or_zero(S p) {
  return p == S(0) ? S(0) : log_of(p);
}

// A row's argmax as the statistics have it, from outside: always a class that there is. The CPU
// refuses another, but the host does not wait to see what is on a GPU.
template <class S>
__device__ int class_of(S argmax, int C) {
  const int k = static_cast<int>(argmax);
  return static_cast<unsigned>(k) < static_cast<unsigned>(C) ? k : 0;
}

constexpr float kLog2E = 1.44269504f;

// 2^x within 2 ulp, one instruction. What is below fp32's smallest normal number is 0.
__device__ inline float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// exp(x - m), exactly 1 for x = m. The difference is taken first: with both products in one FMA,
// the rounding of a large m's would be in every term.
__device__ inline float exp_below(float x, float m) { return exp2_of((x - m) * kLog2E); }

// 1 / x within 2 ulp, for 1 <= x < 2^126 and NaN: sums of exponentials. It needs no call to a slow
// path, around which registers would spill.
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }

// ---- Single elements ---------------------------------------------------------------------------

__device__ inline float decode16(unsigned short bits, Dtype dtype) {
  return dtype == Dtype::bf16 ? __uint_as_float(static_cast<unsigned>(bits) << 16)
                              : __half2float(__ushort_as_half(bits));
}

__device__ inline unsigned short encode16(float value, Dtype dtype) {
  return dtype == Dtype::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                              : __half_as_ushort(__float2half_rn(value));
}

// At an offset in elements.
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

// ---- 16 bytes ----------------------------------------------------------------------------------

// The elements of 16 bytes, in fp32 and back. bf16 is the upper half of an fp32 number.
template <class T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr Dtype kDtype = Dtype::f32;
  static constexpr int kSize = 4;
  static constexpr unsigned kLowest = 0xff800000u;  // a word of -inf

  __device__ static void unpack(unsigned word, float* x) { *x = __uint_as_float(word); }
  __device__ static unsigned pack(const float* x) { return __float_as_uint(*x); }
};

template <>
struct Vector<__nv_bfloat16> {
  static constexpr Dtype kDtype = Dtype::bf16;
  static constexpr int kSize = 8;
  static constexpr unsigned kLowest = 0xff80ff80u;

  __device__ static void unpack(unsigned word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static unsigned pack(const float* x) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    unsigned word;
    memcpy(&word, &pair, 4);
    return word;
  }
};

template <>
struct Vector<__half> {
  static constexpr Dtype kDtype = Dtype::f16;
  static constexpr int kSize = 8;
  static constexpr unsigned kLowest = 0xfc00fc00u;

  __device__ static void unpack(unsigned word, float* x) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    const float2 both = __half22float2(pair);
    x[0] = both.x;
    x[1] = both.y;
  }
  __device__ static unsigned pack(const float* x) {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    unsigned word;
    memcpy(&word, &pair, 4);
    return word;
  }
};

template <class T>
__device__ void unpack(uint4 bits, float* x) {
  constexpr int k = Vector<T>::kSize / 4;  // elements a word
  Vector<T>::unpack(bits.x, x);
  Vector<T>::unpack(bits.y, x + k);
  Vector<T>::unpack(bits.z, x + 2 * k);
  Vector<T>::unpack(bits.w, x + 3 * k);
}

template <class T>
__device__ uint4 pack(const float* x) {
  constexpr int k = Vector<T>::kSize / 4;
  return make_uint4(Vector<T>::pack(x), Vector<T>::pack(x + k), Vector<T>::pack(x + 2 * k),
                    Vector<T>::pack(x + 3 * k));
}

template <class T>
__device__ uint4 load_vector(const void* data, int64_t offset) {
  return *reinterpret_cast<const uint4*>(static_cast<const char*>(data) + offset * sizeof(T));
}

template <class T>
__device__ void store_vector(void* data, int64_t offset, uint4 bits) {
  *reinterpret_cast<uint4*>(static_cast<char*>(data) + offset * sizeof(T)) = bits;
}

// Whether rows of `width` columns are whole aligned vectors of T.
template <class T>
__device__ bool has_vectors(const Matrix& m, int64_t width) {
  constexpr int k = Vector<T>::kSize;
  return m.dtype == Vector<T>::kDtype && m.col_stride == 1 && width % k == 0 &&
         m.row_stride % k == 0 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// The elements of one vector wherever they lie, `count` of them; behind them -inf. A matrix of
// another dtype than T is read only with T = float, which holds fp32, bf16 and fp16 exactly. It is
// a call, because inlined it would take registers from the loops that do without.
template <class T>
__device__ __attribute__((noinline)) uint4 gather_vector(Matrix m, int64_t row, int column,
                                                         int count) {
  constexpr int k = Vector<T>::kSize / 4;
  unsigned words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[k];
#pragma unroll
    for (int j = 0; j < k; ++j) {
      const int i = w * k + j;
      x[j] = i < count ? load<float>(m, row, column + i) : lowest(0.0f);
    }
    words[w] = Vector<T>::pack(x);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The first `count` elements of a vector into a contiguous gradient, at an offset in elements; a
// call for the same reason.
template <class T>
__device__ __attribute__((noinline)) void scatter_vector(void* grad, Dtype dtype, int64_t offset,
                                                         uint4 bits, int count) {
  float x[Vector<T>::kSize];
  unpack<T>(bits, x);
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (i < count) store(grad, dtype, offset + i, x[i]);
  }
}

}  // namespace cuda
}  // namespace dafl
