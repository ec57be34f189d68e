// BatchNorm with the batch's statistics, LeakyReLU, and a 3x3 convolution with padding 1 to one
// channel: see ../layers/norm_image_conv.cpp.
//
// The activations in between, the largest tensor of a generator, are never written: each kernel
// computes them again from x, which it reads once. All arithmetic is in fp32.
#include "norm.cuh"

namespace dafl {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTaps = 9;
constexpr int kRecord = 12;  // numbers of a channel: nine taps, scale, shift, and one for alignment
constexpr int kPair = 2;     // pixels of a thread whose products are formed together
constexpr int kQuad = 4;     // neighbouring pixels of a warp

__device__ inline float tap_of(const ImageConv& a, int c, int tap) {
  const int64_t* stride = a.weight.strides;
  return load<float>(a.weight.data, a.weight.dtype,
                     c * stride[1] + tap / 3 * stride[2] + tap % 3 * stride[3]);
}

// ---- Forward -----------------------------------------------------------------------------------

// First the products of each pixel's activations with the nine taps, by one thread a pixel; then
// each output adds nine of them, of the pixels around it.
template <Dtype D, int V>
__global__ void __launch_bounds__(kThreads, 4) image_conv_kernel(ImageConv a, void* y) {
  const int C = a.norm.C, W = a.W;
  float* records = reinterpret_cast<float*>(block_shared());  // [C][kRecord]
  float* products = records + C * kRecord;                    // [9][count]
  const int tile = blockIdx.x;
  const int64_t n = tile / a.tiles();
  const int first = tile % a.tiles() * a.tile(), end = min(a.H, first + a.tile());
  const int above = first > 0 ? first - 1 : 0, below = end < a.H ? end + 1 : a.H;
  const int count = (below - above) * W;
  for (int c = threadIdx.x; c < C; c += kThreads) {
    const Affine<1> affine(a.norm, c);
    for (int tap = 0; tap < kTaps; ++tap) records[c * kRecord + tap] = tap_of(a, c, tap);
    records[c * kRecord + 9] = affine.scale[0];
    records[c * kRecord + 10] = affine.shift[0];
    records[c * kRecord + 11] = 0;
  }
  __syncthreads();
  const int64_t start = (n * a.H + above) * W;
  for (int p = threadIdx.x; p < count; p += kPair * kThreads) {
    float sum[kPair][kTaps] = {};
#pragma unroll 1
    for (int c = 0; c < C; c += V) {
      Values<D, V> x[kPair];
#pragma unroll
      for (int k = 0; k < kPair; ++k) {  // the last pixel again for one that is not there
        const int pixel = min(p + k * kThreads, count - 1);
        x[k] = Values<D, V>::from(a.norm.x, (start + pixel) * C + c);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float4* record = reinterpret_cast<const float4*>(records + (c + i) * kRecord);
        const float4 r0 = record[0], r1 = record[1], r2 = record[2];
        const float taps[kTaps] = {r0.x, r0.y, r0.z, r0.w, r1.x, r1.y, r1.z, r1.w, r2.x};
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
          const float z = x[k].get(i) * r2.y + r2.z;
          const float active = z > 0 ? z : z * a.norm.slope;
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap) sum[k][tap] += active * taps[tap];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      const int pixel = p + k * kThreads;
      if (pixel >= count) break;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) products[tap * count + pixel] = sum[k][tap];
    }
  }
  __syncthreads();
  const float bias = load<float>(a.bias.data, a.bias.dtype, 0);
  for (int p = threadIdx.x; p < (end - first) * W; p += kThreads) {
    const int row = first + p / W, column = p % W;
    float sum = bias;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int from = row + tap / 3 - 1, beside = column + tap % 3 - 1;
      if (from < 0 || from >= a.H || beside < 0 || beside >= W) continue;
      sum += products[tap * count + (from - above) * W + beside];
    }
    store<float>(y, D, (n * a.H + row) * W + column, sum);
  }
}

// ---- Backward ----------------------------------------------------------------------------------

DAFL_HD int pitch_of(int W) { return (W + kQuad - 1) / kQuad * kQuad + 2; }

// The gradients of a tile's outputs with a margin of one all around, in shared memory.
struct Plane {
  float* values;
  int pitch, quads;  // of a row

  __device__ Plane(const ImageConv& a, float* shared)
      : values(shared), pitch(pitch_of(a.W)), quads((a.W + kQuad - 1) / kQuad) {}

  // The rows [first, end) of image n. Returns this thread's share of their sum.
  __device__ float fill(const ImageConv& a, const void* grad, Dtype dtype, int64_t n, int first,
                        int end) const {
    float sum = 0;
#pragma unroll 4
    for (int k = threadIdx.x; k < (end - first + 2) * pitch; k += kThreads) {
      const int row = first + k / pitch - 1, column = k % pitch - 1;
      const bool in = row >= 0 && row < a.H && column >= 0 && column < a.W;
      const float value = in ? load<float>(grad, dtype, (n * a.H + row) * a.W + column) : 0.0f;
      values[k] = value;
      if (row >= first && row < end) sum += value;
    }
    return sum;
  }
};

// A warp has 32 * V channels of four neighbouring pixels at a time.
template <Dtype D, int V>
struct Channels {
  int c;  // the first of this thread, or -1
  Affine<V> affine;
  float taps[kTaps][V];

  __device__ explicit Channels(const ImageConv& a)
      : c(static_cast<int>(blockIdx.y * kWarp + threadIdx.x % kWarp) * V),
        affine(a.norm, c = c < a.norm.C ? c : -1) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
      for (int i = 0; i < V; ++i) taps[tap][i] = c < 0 ? 0.0f : tap_of(a, c + i, tap);
    }
  }

  // each(where, values of x, the gradients of the outputs that they take part in by each tap) for
  // the warp's pixels of the rows [first, end) of image n.
  template <class Each>
  __device__ void for_pixels(const ImageConv& a, const Plane& plane, int64_t n, int first, int end,
                             Each each) const {
    if (c < 0) return;
    const int items = (end - first) * plane.quads;
    for (int item = threadIdx.x / kWarp; item < items; item += kWarps) {
      const int row = item / plane.quads, column = item % plane.quads * kQuad;
      const int64_t at = ((n * a.H + first + row) * a.W + column) * a.norm.C + c;
      Values<D, V> x[kQuad];
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (column + k < a.W) x[k] = Values<D, V>::from(a.norm.x, at + k * a.norm.C);
      }
      float near[3][kQuad + 2];
#pragma unroll
      for (int r = 0; r < 3; ++r) {
#pragma unroll
        for (int k = 0; k < kQuad + 2; ++k) {
          near[r][k] = plane.values[(row + r) * plane.pitch + column + k];
        }
      }
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (column + k >= a.W) break;
        float grads[kTaps];
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) grads[tap] = near[2 - tap / 3][k + 2 - tap % 3];
        each(at + k * a.norm.C, x[k], grads);
      }
    }
  }

  // The gradient before the activation.
  __device__ float before(const ImageConv& a, int i, float x, const float (&grads)[kTaps]) const {
    float grad = 0;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) grad += taps[tap][i] * grads[tap];
    return affine.before(i, x, grad, a.norm.slope);
  }
};

// parts [parts][11 C + 1]: sums of the gradient before the activation, and of that times x - mean;
// the gradients of the nine taps; that of the bias
template <Dtype D, int V>
__global__ void __launch_bounds__(kThreads)
    image_sums_kernel(ImageConv a, const void* grad, double* parts) {
  constexpr int kSums = 2 + kTaps, kWidth = kWarp * V;
  const int C = a.norm.C, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* shared = reinterpret_cast<float*>(block_shared());
  const Plane plane(a, shared);
  const Channels<D, V> own(a);
  float mean[V] = {}, sums[kSums][V] = {}, total = 0;
  if (own.c >= 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) mean[i] = a.norm.mean[own.c + i];
  }
  const int64_t begin = blockIdx.x * a.units_per_part();
  const int64_t stop = min(a.units(), begin + a.units_per_part());
  for (int64_t unit = begin; unit < stop; ++unit) {
    const int64_t n = unit / a.tiles();
    const int first = static_cast<int>(unit % a.tiles()) * a.tile(),
              end = min(a.H, first + a.tile());
    __syncthreads();  // all have read what was there
    total += plane.fill(a, grad, D, n, first, end);
    __syncthreads();
    own.for_pixels(a, plane, n, first, end,
                   [&](int64_t, const Values<D, V>& x, const float (&grads)[kTaps]) {
#pragma unroll
                     for (int i = 0; i < V; ++i) {
                       const float value = x.get(i), before = own.before(a, i, value, grads);
                       const float z = own.affine.normalised(i, value);
                       const float active = z > 0 ? z : z * a.norm.slope;
                       sums[0][i] += before;
                       sums[1][i] += before * (value - mean[i]);
#pragma unroll
                       for (int tap = 0; tap < kTaps; ++tap) {
                         sums[2 + tap][i] += active * grads[tap];
                       }
                     }
                   });
  }
  __syncthreads();
  total = lane_sum(total);
  float* totals = shared + kWarps * kSums * kWidth;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < V; ++i) shared[(warp * kSums + s) * kWidth + lane * V + i] = sums[s][i];
  }
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  double* to = parts + blockIdx.x * static_cast<int64_t>(a.sums());
  for (int k = threadIdx.x; k < kSums * kWidth; k += kThreads) {
    const int c = blockIdx.y * kWidth + k % kWidth;
    if (c >= C) continue;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[w * kSums * kWidth + k];
    to[k / kWidth * C + c] = sum;
  }
  if (threadIdx.x > 0 || blockIdx.y > 0) return;
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += totals[w];
  to[kSums * C] = sum;
}

// Adds the parts. The sums for the norm go behind them, the others to the gradients.
__global__ void __launch_bounds__(kThreads)
    image_add_kernel(ImageConv a, double* parts, Parameter grad_weight, Parameter grad_bias) {
  const int C = a.norm.C, width = a.sums();
  const int k = blockIdx.x * kWarp + threadIdx.x % kWarp;
  static_assert(kThreads == kAddThreads, "add_columns");
  const double sum = add_columns(a.parts(), reinterpret_cast<double*>(block_shared()),
                                 [&](int64_t p) { return k < width ? parts[p * width + k] : 0.0; });
  if (threadIdx.x >= kWarp || k >= width) return;
  const int64_t* stride = grad_weight.strides;
  const int c = k % C, tap = k / C - 2;
  if (k == width - 1) {
    store<double>(grad_bias.data, grad_bias.dtype, 0, sum);
  } else if (tap < 0) {
    parts[a.parts() * width + k] = sum;
  } else {
    store<double>(grad_weight.data, grad_weight.dtype,
                  c * stride[1] + tap / 3 * stride[2] + tap % 3 * stride[3], sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    image_factors_kernel(Norm a, const double* sums, float* factors, Parameter grad_weight,
                         Parameter grad_bias) {
  for (int c = threadIdx.x; c < a.C; c += kThreads) {
    write_factors(a, c, sums[c], sums[a.C + c], factors, grad_weight, grad_bias);
  }
}

template <Dtype D, int V>
__global__ void __launch_bounds__(kThreads)
    image_gradient_kernel(ImageConv a, const void* grad, const float* factors, void* grad_x) {
  const Plane plane(a, reinterpret_cast<float*>(block_shared()));
  const Channels<D, V> own(a);
  float by_x[V] = {}, constant[V] = {};
  if (own.c >= 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      by_x[i] = factors[own.c + i];
      constant[i] = factors[a.norm.C + own.c + i];
    }
  }
  const int tile = blockIdx.x;
  const int64_t n = tile / a.tiles();
  const int first = tile % a.tiles() * a.tile(), end = min(a.H, first + a.tile());
  plane.fill(a, grad, D, n, first, end);
  __syncthreads();
  own.for_pixels(a, plane, n, first, end,
                 [&](int64_t at, const Values<D, V>& x, const float (&grads)[kTaps]) {
                   Values<D, V> result;
#pragma unroll
                   for (int i = 0; i < V; ++i) {
                     const float value = x.get(i);
                     result.set(i, own.before(a, i, value, grads) * own.affine.scale[i] +
                                       (value * by_x[i] + constant[i]));
                   }
                   result.to(grad_x, at);
                 });
}

// ---- Launching ---------------------------------------------------------------------------------

int64_t plane_bytes(const ImageConv& a) { return int64_t{4} * (a.tile() + 2) * pitch_of(a.W); }

}  // namespace

cudaError_t launch_image_conv(const ImageConv& a, void* y, cudaStream_t stream) {
  const int rows = a.tiles() == 1 ? a.H : a.tile() + 2;
  const int64_t shared = int64_t{4} * (a.norm.C * kRecord + kTaps * rows * a.W);
  return by_kind<4, 8>(
      a.norm.dtype, a.norm.C,
      [&](auto kind) {
        using K = decltype(kind);
        return launch(image_conv_kernel<K::dtype, K::width>, dim3(a.units()), kThreads, 1, shared,
                      stream, a, y);
      },
      a.norm.x);
}

cudaError_t launch_image_conv_backward(const ImageConv& a, const void* grad, double* parts,
                                       float* factors, void* grad_x,
                                       const Parameter& grad_norm_weight,
                                       const Parameter& grad_norm_bias,
                                       const Parameter& grad_weight, const Parameter& grad_bias,
                                       cudaStream_t stream) {
  return by_kind<2, 2>(
      a.norm.dtype, a.norm.C,
      [&](auto kind) {
        using K = decltype(kind);
        const int width = kWarp * K::width, chunks = (a.norm.C + width - 1) / width;
        const int64_t plane = plane_bytes(a);
        const int64_t sums = int64_t{4} * (kWarps * (2 + kTaps) * width + kWarps);
        cudaError_t error =
            launch(image_sums_kernel<K::dtype, K::width>, dim3(a.parts(), chunks), kThreads, 1,
                   plane > sums ? plane : sums, stream, a, grad, parts);
        if (error == cudaSuccess) {
          error = launch(image_add_kernel, dim3((a.sums() + kWarp - 1) / kWarp), kThreads, 1,
                         kThreads * 8, stream, a, parts, grad_weight, grad_bias);
        }
        if (error == cudaSuccess) {
          error = launch(image_factors_kernel, dim3(1), kThreads, 1, 0, stream, a.norm,
                         parts + a.parts() * a.sums(), factors, grad_norm_weight, grad_norm_bias);
        }
        if (error == cudaSuccess) {
          error = launch(image_gradient_kernel<K::dtype, K::width>, dim3(a.units(), chunks),
                         kThreads, 1, plane, stream, a, grad, factors, grad_x);
        }
        return error;
      },
      a.norm.x, grad_x);
}

}  // namespace cuda
}  // namespace dafl
