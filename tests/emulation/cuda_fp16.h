#pragma once

#include "cuda_runtime.h"

using __half = _Float16;
using half = __half;
struct alignas(4) __half2 {
  __half x, y;  // low half, high half
};
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return __emulated_bits<__half>(bits); }
inline unsigned short __half_as_ushort(__half value) {
  return __emulated_bits<unsigned short>(value);
}
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
