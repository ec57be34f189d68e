// The part of CUDA that csrc/cuda uses, on one CPU thread: kernels run unchanged, each GPU thread
// as a fiber. Barriers and shuffles switch fibers, so what is tested is the kernels' own indexing,
// barriers and order of summation. scheduler.h says which orders there are and which mistakes end
// a launch. Memory ordering, timing and hardware limits are not tested.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __device__
#define __host__
#define __global__ [[maybe_unused]] static
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// Vector types, aligned as CUDA's: -fsanitize=alignment finds an access that is not.
#define EMULATE_VECTORS(Scalar, name)                                                          \
  struct alignas(2 * sizeof(Scalar)) name##2 { Scalar x, y; };                                 \
  struct alignas(sizeof(Scalar) < 8 ? 4 * sizeof(Scalar) : 16) name##4 { Scalar x, y, z, w; }; \
  inline name##2 make_##name##2(Scalar x, Scalar y) { return {x, y}; }                         \
  inline name##4 make_##name##4(Scalar x, Scalar y, Scalar z, Scalar w) { return {x, y, z, w}; }
EMULATE_VECTORS(float, float)
EMULATE_VECTORS(double, double)
EMULATE_VECTORS(int, int)
EMULATE_VECTORS(unsigned, uint)
EMULATE_VECTORS(unsigned short, ushort)
#undef EMULATE_VECTORS

template <class To, class From>
To __emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as it stands");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return __emulated_bits<float>(bits); }
inline float __int_as_float(int bits) { return __emulated_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return __emulated_bits<unsigned>(value); }
inline int __float_as_int(float value) { return __emulated_bits<int>(value); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
// Of a NaN and a number, the number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
  }
  emulation::body = [=] { kernel(arguments...); };
  const bool good =
      emulation::run(config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes);
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::together(emulation::kSync, mask, 0, 0);
}

// A shuffle of any type of up to 8 bytes. `width` cuts a warp into segments, as in CUDA.
template <class T>
T __emulated_shuffle(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= 8, "CUDA has no larger ones");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulation::together(emulation::kShuffle, mask, bits, static_cast<unsigned>(lane));
  memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int __emulated_lane() { return threadIdx.x % emulation::kLanes; }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return __emulated_shuffle(mask, value, (__emulated_lane() & ~(width - 1)) + (lane & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const int own = __emulated_lane(), other = own ^ with;
  return __emulated_shuffle(mask, value, other / width > own / width ? own : other);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int own = __emulated_lane(), other = own + static_cast<int>(by);
  return __emulated_shuffle(mask, value, other / width != own / width ? own : other);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int own = __emulated_lane(), other = own - static_cast<int>(by);
  return __emulated_shuffle(mask, value, other < own / width * width ? own : other);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::together(emulation::kBallot, mask, predicate != 0, 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulation::together(emulation::kAny, mask, predicate != 0, 0);
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulation::together(emulation::kAll, mask, predicate != 0, 0);
}
// No more is promised than that the lane itself is active.
inline unsigned __activemask() { return 1u << __emulated_lane(); }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulation::together(emulation::kAdd, mask, value, 0);
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return emulation::together(emulation::kAdd, mask, static_cast<unsigned>(value), 0);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return emulation::together(emulation::kMin, mask, value, 0);
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return emulation::together(emulation::kMinSigned, mask, static_cast<unsigned>(value), 0);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emulation::together(emulation::kMax, mask, value, 0);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return emulation::together(emulation::kMaxSigned, mask, static_cast<unsigned>(value), 0);
}
