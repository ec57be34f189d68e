// What the kernels with a BatchNorm in them share.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace dafl {
namespace cuda {

template <Dtype D>
struct Raw {
  using T = unsigned short;
};
template <>
struct Raw<Dtype::f32> {
  using T = float;
};

// V numbers as they are in memory.
template <Dtype D, int V>
struct alignas(sizeof(typename Raw<D>::T) * V) Values {
  using T = typename Raw<D>::T;
  T v[V];

  static __device__ Values from(const void* data, int64_t at) {
    return *reinterpret_cast<const Values*>(static_cast<const T*>(data) + at);
  }
  __device__ void to(void* data, int64_t at) const {
    *reinterpret_cast<Values*>(static_cast<T*>(data) + at) = *this;
  }
  __device__ float get(int i) const {
    if constexpr (D == Dtype::f32) {
      return v[i];
    } else {
      return decode16(v[i], D);
    }
  }
  __device__ void set(int i, float value) {
    if constexpr (D == Dtype::f32) {
      v[i] = value;
    } else {
      v[i] = encode16(value, D);
    }
  }
};

// The affine map of V channels: normalised, scaled and shifted is scale * x + shift.
template <int V>
struct Affine {
  float scale[V], shift[V];

  __device__ Affine(const Norm& a, int c) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (c < 0) break;
      scale[i] = load<float>(a.weight.data, a.weight.dtype, (c + i) * a.weight.strides[0]) /
                 sqrtf(a.variance[c + i] + a.eps);
      shift[i] = load<float>(a.bias.data, a.bias.dtype, (c + i) * a.bias.strides[0]) -
                 a.mean[c + i] * scale[i];
    }
  }
  __device__ float normalised(int i, float x) const { return x * scale[i] + shift[i]; }
  // The gradient before the activation.
  __device__ float before(int i, float x, float grad, float slope) const {
    return normalised(i, x) > 0 ? grad : grad * slope;
  }
};

// The factors [2][C] of channel c, and the gradients of the norm's parameters, from the sums over
// all rows of the gradient before the activation, and of that times x - mean. The gradient to x is
// scale * before + factors[0] * x + factors[1]; see ../layers/norm.h.
__device__ inline void write_factors(const Norm& a, int c, double sum, double product,
                                     float* factors, const Parameter& grad_weight,
                                     const Parameter& grad_bias) {
  const double weight = load<double>(a.weight.data, a.weight.dtype, c * a.weight.strides[0]);
  const double inverse = 1 / sqrt(static_cast<double>(a.variance[c]) + a.eps);
  const double scale = weight * inverse, rows = static_cast<double>(a.rows);
  const double by_x = -scale * inverse * inverse * product / rows;
  factors[c] = static_cast<float>(by_x);
  factors[a.C + c] = static_cast<float>(-scale * sum / rows - by_x * a.mean[c]);
  store<double>(grad_weight.data, grad_weight.dtype, c * grad_weight.strides[0], product * inverse);
  store<double>(grad_bias.data, grad_bias.dtype, c * grad_bias.strides[0], sum);
}

template <Dtype D, int V>
struct Kind {
  static constexpr Dtype dtype = D;
  static constexpr int width = V;
};

// call(Kind) for the dtype: V numbers at once if C and all pointers allow it, else one.
template <Dtype D, int V, class Call, class... Pointers>
cudaError_t by_width(int C, Call call, Pointers... pointers) {
  const bool aligned = (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
  return aligned && C % V == 0 ? call(Kind<D, V>()) : call(Kind<D, 1>());
}

template <int kWide, int kNarrow, class Call, class... Pointers>
cudaError_t by_kind(Dtype dtype, int C, Call call, Pointers... pointers) {
  if (dtype == Dtype::f32) return by_width<Dtype::f32, kWide>(C, call, pointers...);
  if (dtype == Dtype::bf16) return by_width<Dtype::bf16, kNarrow>(C, call, pointers...);
  return by_width<Dtype::f16, kNarrow>(C, call, pointers...);
}

}  // namespace cuda
}  // namespace dafl
