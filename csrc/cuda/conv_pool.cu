// Valid 5x5 convolution, 2x2 max pooling and ReLU for few channels, and its gradients: see
// ../layers/conv_pool.cpp. Ties, NaN and rounding are those of the CPU's kernels.
//
// A block has one image at a time. In shared memory are its planes and the weights, of as many
// channels at once as fit (a stage). All arithmetic is in S.
#include "launch.h"
#include "reduce.cuh"

namespace dafl {
namespace cuda {
namespace {

constexpr int kMostThreads = 256;
constexpr int kShared = 48 << 10;  // bytes that every GPU gives a block
constexpr int kTaps = 25;
constexpr int kRowTaps = 8;  // five taps of a row, with room to read them as vectors

// n numbers that are read and written at once.
template <class S, int n>
struct alignas(sizeof(S) * n < 16 ? sizeof(S) * n : 16) Pack {
  S v[n];
};

template <int n, class S>
__device__ Pack<S, n> load_pack(const S* from) {
  return *reinterpret_cast<const Pack<S, n>*>(from);
}

// each(i, value) for `count` elements from an offset on, by all threads of the block. The loads of
// several stand together, so that they are under way at once.
template <class S, class Each>
__device__ void for_elements(const void* data, Dtype dtype, int64_t offset, int count, Each each) {
  if (dtype == Dtype::f32) {
    const float* from = static_cast<const float*>(data) + offset;
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += blockDim.x) each(i, static_cast<S>(from[i]));
  } else if (dtype == Dtype::f64) {
    const double* from = static_cast<const double*>(data) + offset;
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += blockDim.x) each(i, static_cast<S>(from[i]));
  } else {
    const unsigned short* from = static_cast<const unsigned short*>(data) + offset;
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      each(i, static_cast<S>(decode16(from[i], dtype)));
    }
  }
}

// each(o, c, tap, value) for the weights of `outs` output and `ins` input channels from o0 and c0
// on. A warp reads the taps of one pair of channels.
template <class S, class Each>
__device__ void for_weights(const ConvPool& a, int o0, int outs, int c0, int ins, Each each) {
  const int tap = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (tap >= kTaps) return;
  const int64_t* stride = a.weight.strides;
  const int64_t first = o0 * stride[0] + c0 * stride[1] + tap / 5 * stride[2] + tap % 5 * stride[3];
  const int pairs = outs * ins;
  if (a.weight.dtype == Dtype::f32) {
    const float* from = static_cast<const float*>(a.weight.data) + first;
#pragma unroll 8
    for (int pair = threadIdx.x / kWarp; pair < pairs; pair += warps) {
      const int o = pair / ins, c = pair % ins;
      each(o, c, tap, static_cast<S>(from[o * stride[0] + c * stride[1]]));
    }
  } else {
    for (int pair = threadIdx.x / kWarp; pair < pairs; pair += warps) {
      const int o = pair / ins, c = pair % ins;
      const int64_t at = first + o * stride[0] + c * stride[1];
      each(o, c, tap, load<S>(a.weight.data, a.weight.dtype, at));
    }
  }
}

// ---- Forward -----------------------------------------------------------------------------------

// A thread has four output channels of a pooled pixel: its 6x6 patch is read once for all of them.
struct ForwardSizes {
  int groups, pitch, plane, taps;  // of four outputs; of a row; of an input channel, in numbers

  DAFL_HD explicit ForwardSizes(const ConvPool& a)
      : groups((a.out + 3) / 4),
        pitch(a.W + a.W % 2),
        plane(a.H * pitch),
        taps(kTaps * 4 * groups) {}
};

template <class S>
__global__ void __launch_bounds__(kMostThreads)
    conv_pool_kernel(ConvPool a, void* y, uint8_t* index, int stage) {
  const ForwardSizes sizes(a);
  const int pooled = a.pooled(), padded = 4 * sizes.groups, items = sizes.groups * pooled;
  const int64_t n = blockIdx.x, start = n * a.out * pooled;
  if (n >= a.N) {
    for (int i = threadIdx.x; i < a.out * pooled; i += blockDim.x) index[start + i] = 0;
    return;
  }
  S* taps = reinterpret_cast<S*>(block_shared());
  S* planes = taps + stage * sizes.taps;
  for (int first = 0; first < items; first += blockDim.x) {
    const int item = first + threadIdx.x;
    const int position = item % pooled, o0 = item / pooled * 4;
    const int i = position / a.width(), j = position % a.width();
    S sum[4][4];  // of each output, where the four stand in a row
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int64_t at = (o0 + b) * a.bias.strides[0];
      const S bias = o0 + b < a.out ? load<S>(a.bias.data, a.bias.dtype, at) : S(0);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[b][k] = bias;
    }
    for (int c0 = 0; c0 < a.in; c0 += stage) {
      const int channels = min(stage, a.in - c0);
      if (first == 0 || stage < a.in) {
        __syncthreads();  // all have read what was there
        for_weights<S>(a, 0, a.out, c0, channels, [&](int o, int c, int tap, S value) {
          taps[(c * kTaps + tap) * padded + o] = value;
        });
        // Those of outputs that fill up a group are read, and never used.
        for_elements<S>(a.x, a.dtype, (n * a.in + c0) * a.H * a.W, channels * a.H * a.W,
                        [&](int k, S value) { planes[k / a.W * sizes.pitch + k % a.W] = value; });
        __syncthreads();
      }
      if (item >= items) continue;
      for (int c = 0; c < channels; ++c) {
        const S* patch = planes + c * sizes.plane + 2 * i * sizes.pitch + 2 * j;
        S in[6][6];
#pragma unroll
        for (int r = 0; r < 6; ++r) {
#pragma unroll
          for (int k = 0; k < 3; ++k) {
            const Pack<S, 2> two = load_pack<2>(patch + r * sizes.pitch + 2 * k);
            in[r][2 * k] = two.v[0];
            in[r][2 * k + 1] = two.v[1];
          }
        }
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const Pack<S, 4> w = load_pack<4>(taps + (c * kTaps + tap) * padded + o0);
#pragma unroll
          for (int b = 0; b < 4; ++b) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[b][k] += in[tap / 5 + k / 2][tap % 5 + k % 2] * w.v[b];
          }
        }
      }
    }
    if (item >= items) continue;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (o0 + b >= a.out) break;
      S best = sum[b][0];
      int which = 0;
#pragma unroll
      for (int k = 1; k < 4; ++k) {  // the first of equals wins, NaN wins over all
        if (sum[b][k] > best || sum[b][k] != sum[b][k]) {
          best = sum[b][k];
          which = k;
        }
      }
      const bool off = best <= S(0);
      const int64_t at = start + (o0 + b) * pooled + position;
      index[at] = off ? 4 : which;
      store<S>(y, a.dtype, at, off ? S(0) : best);
    }
  }
}

// ---- Gradient to the input ---------------------------------------------------------------------

// The gradients of the convolution's outputs, zero but where a pixel won, with a margin of four
// zeros all around. A thread has four pixels of a row.
struct InputSizes {
  int quads, pitch, plane, taps;  // of a row; of an output channel, in numbers

  DAFL_HD explicit InputSizes(const ConvPool& a)
      : quads((a.W + 3) / 4),
        pitch(4 * quads + 4),
        plane((a.H + 4) * pitch),
        taps(a.in * 5 * kRowTaps) {}
};

template <class S>
__global__ void __launch_bounds__(kMostThreads)
    conv_pool_inputs_kernel(ConvPool a, const void* grad, const uint8_t* index, void* grad_x,
                            int stage) {
  const InputSizes sizes(a);
  const int pooled = a.pooled(), items = a.in * a.H * sizes.quads;
  const int64_t n = blockIdx.x;
  S* planes = reinterpret_cast<S*>(block_shared());
  S* taps = planes + stage * sizes.plane;
  for (int first = 0; first < items; first += blockDim.x) {
    const int item = first + threadIdx.x;
    const int q = item % sizes.quads, row = item / sizes.quads, h = row % a.H, c = row / a.H;
    S sum[4] = {};
    for (int o0 = 0; o0 < a.out; o0 += stage) {
      const int channels = min(stage, a.out - o0);
      if (first == 0 || stage < a.out) {
        __syncthreads();  // all have read what was there
        for (int k = 4 * threadIdx.x; k < channels * sizes.plane; k += 4 * blockDim.x) {
          *reinterpret_cast<Pack<S, 4>*>(planes + k) = Pack<S, 4>{};
        }
        for_weights<S>(a, o0, channels, 0, a.in, [&](int o, int in, int tap, S value) {
          taps[((o * a.in + in) * 5 + tap / 5) * kRowTaps + tap % 5] = value;
        });
        __syncthreads();
        const int64_t start = (n * a.out + o0) * pooled;
        for_elements<S>(grad, a.dtype, start, channels * pooled, [&](int k, S value) {
          const int which = index[start + k], o = k / pooled, position = k % pooled;
          const int i = position / a.width(), j = position % a.width();
          const int y = 2 * i + which / 2 + 4, x = 2 * j + which % 2 + 4;
          if (which < 4) planes[o * sizes.plane + y * sizes.pitch + x] = value;
        });
        __syncthreads();
      }
      if (item >= items) continue;
      for (int o = 0; o < channels; ++o) {
        const S* from = planes + o * sizes.plane + (h + 4) * sizes.pitch + 4 * q;
        const S* tap = taps + (o * a.in + c) * 5 * kRowTaps;
#pragma unroll
        for (int ky = 0; ky < 5; ++ky) {
          const Pack<S, 4> left = load_pack<4>(from - ky * sizes.pitch);
          const Pack<S, 4> right = load_pack<4>(from - ky * sizes.pitch + 4);
          const Pack<S, 4> four = load_pack<4>(tap + ky * kRowTaps);
          const S near[8] = {left.v[0],  left.v[1],  left.v[2],  left.v[3],
                             right.v[0], right.v[1], right.v[2], right.v[3]};
          const S w[5] = {four.v[0], four.v[1], four.v[2], four.v[3], tap[ky * kRowTaps + 4]};
#pragma unroll
          for (int kx = 0; kx < 5; ++kx) {
#pragma unroll
            for (int p = 0; p < 4; ++p) sum[p] += near[p + 4 - kx] * w[kx];
          }
        }
      }
    }
    if (item >= items) continue;
    const int64_t at = ((n * a.in + c) * a.H + h) * a.W + 4 * q;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if (4 * q + p < a.W) store<S>(grad_x, a.dtype, at + p, sum[p]);
    }
  }
}

// ---- Gradients of weight and bias --------------------------------------------------------------

// A winner: its gradient, and where in a plane the patch of its pixel begins.
template <class S>
struct alignas(2 * sizeof(S)) Winner {
  S grad;
  int at;
};

// A thread has some of the weights. A part is a block's images.
template <class S>
__global__ void __launch_bounds__(kMostThreads)
    conv_pool_weights_kernel(ConvPool a, const void* grad, const uint8_t* index, double* parts,
                             int64_t images, int in_stage, int out_stage) {
  const int pooled = a.pooled(), plane = a.H * a.W, taps = a.out * a.in * kTaps;
  Winner<S>* winners = reinterpret_cast<Winner<S>*>(block_shared());
  S* planes = reinterpret_cast<S*>(winners + out_stage * pooled);
  double* sums = parts + blockIdx.x * static_cast<int64_t>(taps + a.out);
  const int64_t begin = blockIdx.x * images, end = min(a.N, begin + images);
  for (int64_t n = begin; n < end; ++n) {
    for (int c0 = 0; c0 < a.in; c0 += in_stage) {
      const int ins = min(in_stage, a.in - c0);
      for (int o0 = 0; o0 < a.out; o0 += out_stage) {
        const int outs = min(out_stage, a.out - o0);
        __syncthreads();  // all have read what was there
        if (o0 == 0) {
          for_elements<S>(a.x, a.dtype, (n * a.in + c0) * plane, ins * plane,
                          [&](int k, S value) { planes[k] = value; });
        }
        const int64_t start = (n * a.out + o0) * pooled;
        for_elements<S>(grad, a.dtype, start, outs * pooled, [&](int k, S value) {
          const int which = index[start + k], position = k % pooled;
          const int i = position / a.width(), j = position % a.width();
          const int at = (2 * i + which / 2) * a.W + 2 * j + which % 2;
          winners[k] = which < 4 ? Winner<S>{value, at} : Winner<S>{S(0), 0};
        });
        __syncthreads();
        const auto add = [&](int k, S sum) { sums[k] = (n == begin ? 0.0 : sums[k]) + sum; };
        for (int item = threadIdx.x; item < outs * ins * kTaps; item += blockDim.x) {
          const int tap = item % kTaps, c = item / kTaps % ins, o = item / kTaps / ins;
          const S* from = planes + c * plane + tap / 5 * a.W + tap % 5;
          const Winner<S>* winner = winners + o * pooled;
          S sum = 0;
#pragma unroll 8
          for (int k = 0; k < pooled; ++k) sum += winner[k].grad * from[winner[k].at];
          add(((o0 + o) * a.in + c0 + c) * kTaps + tap, sum);
        }
        if (c0 > 0) continue;
        for (int o = threadIdx.x; o < outs; o += blockDim.x) {
          S sum = 0;
          for (int k = 0; k < pooled; ++k) sum += winners[o * pooled + k].grad;
          add(taps + o0 + o, sum);
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kAddThreads)
    conv_pool_sum_kernel(ConvPool a, const double* parts, int64_t count, Parameter grad_weight,
                         Parameter grad_bias) {
  double* shared = reinterpret_cast<double*>(block_shared());
  const int taps = a.out * a.in * kTaps, width = taps + a.out;
  const int k = blockIdx.x * kWarp + threadIdx.x % kWarp;
  const double sum =
      add_columns(count, shared, [&](int64_t p) { return k < width ? parts[p * width + k] : 0.0; });
  if (threadIdx.x >= kWarp || k >= width) return;
  if (k >= taps) {
    store(grad_bias.data, grad_bias.dtype, (k - taps) * grad_bias.strides[0], sum);
    return;
  }
  const int tap = k % kTaps, c = k / kTaps % a.in, o = k / kTaps / a.in;
  const int64_t* stride = grad_weight.strides;
  store(grad_weight.data, grad_weight.dtype,
        o * stride[0] + c * stride[1] + tap / 5 * stride[2] + tap % 5 * stride[3], sum);
}

// ---- Launching ---------------------------------------------------------------------------------

// Whole warps, so many that each thread has about as many of the items as any other.
int threads_for(int64_t items) {
  const int64_t turns = (items + kMostThreads - 1) / kMostThreads;
  const int64_t each = (items + turns - 1) / turns;
  return static_cast<int>((each + kWarp - 1) / kWarp * kWarp);
}

// How many of `channels` fit, if each takes so many numbers.
int stage_of(int channels, int64_t numbers, int64_t size, int64_t room) {
  const int64_t fit = room / (numbers * size);
  return static_cast<int>(fit < channels ? fit : channels);
}

template <class S>
cudaError_t forward(const ConvPool& a, void* y, uint8_t* index, int64_t images,
                    cudaStream_t stream) {
  const ForwardSizes sizes(a);
  const int numbers = sizes.plane + sizes.taps;
  const int stage = stage_of(a.in, numbers, sizeof(S), kShared);
  const int64_t shared = static_cast<int64_t>(stage) * numbers * sizeof(S);
  const int threads = threads_for(static_cast<int64_t>(sizes.groups) * a.pooled());
  return launch(conv_pool_kernel<S>, dim3(images), threads, 1, shared, stream, a, y, index, stage);
}

template <class S>
cudaError_t inputs(const ConvPool& a, const void* grad, const uint8_t* index, void* grad_x,
                   cudaStream_t stream) {
  const InputSizes sizes(a);
  const int numbers = sizes.plane + sizes.taps;
  const int stage = stage_of(a.out, numbers, sizeof(S), kShared);
  const int64_t shared = static_cast<int64_t>(stage) * numbers * sizeof(S);
  const int threads = threads_for(static_cast<int64_t>(a.in) * a.H * sizes.quads);
  return launch(conv_pool_inputs_kernel<S>, dim3(a.N), threads, 1, shared, stream, a, grad, index,
                grad_x, stage);
}

template <class S>
cudaError_t weights(const ConvPool& a, const void* grad, const uint8_t* index, double* parts,
                    int64_t count, cudaStream_t stream) {
  const int64_t images = (a.N + count - 1) / count;
  const int64_t plane = static_cast<int64_t>(a.H) * a.W;
  const int in_stage = stage_of(a.in, plane, sizeof(S), kShared * 2 / 3);
  const int out_stage = stage_of(a.out, a.pooled(), sizeof(Winner<S>), kShared / 3);
  const int64_t shared = in_stage * plane * static_cast<int64_t>(sizeof(S)) +
                         out_stage * a.pooled() * static_cast<int64_t>(sizeof(Winner<S>));
  const int threads = threads_for(static_cast<int64_t>(out_stage) * in_stage * kTaps);
  return launch(conv_pool_weights_kernel<S>, dim3(count), threads, 1, shared, stream, a, grad,
                index, parts, images, in_stage, out_stage);
}

}  // namespace

cudaError_t launch_conv_pool(const ConvPool& a, void* y, uint8_t* index, int64_t images,
                             cudaStream_t stream) {
  return a.dtype == Dtype::f64 ? forward<double>(a, y, index, images, stream)
                               : forward<float>(a, y, index, images, stream);
}

cudaError_t launch_conv_pool_inputs(const ConvPool& a, const void* grad, const uint8_t* index,
                                    void* grad_x, cudaStream_t stream) {
  return a.dtype == Dtype::f64 ? inputs<double>(a, grad, index, grad_x, stream)
                               : inputs<float>(a, grad, index, grad_x, stream);
}

cudaError_t launch_conv_pool_weights(const ConvPool& a, const void* grad, const uint8_t* index,
                                     double* parts, const Parameter& grad_weight,
                                     const Parameter& grad_bias, cudaStream_t stream) {
  const int64_t width = static_cast<int64_t>(a.out) * a.in * kTaps + a.out;
  const int64_t count = conv_pool_parts(a.N, width);
  const cudaError_t error = a.dtype == Dtype::f64
                                ? weights<double>(a, grad, index, parts, count, stream)
                                : weights<float>(a, grad, index, parts, count, stream);
  if (error != cudaSuccess) return error;
  return launch(conv_pool_sum_kernel, dim3((width + kWarp - 1) / kWarp), 256, 1, 256 * 8, stream, a,
                parts, count, grad_weight, grad_bias);
}

}  // namespace cuda
}  // namespace dafl
