// BatchNorm with the batch's statistics, then LeakyReLU, of [rows, C]: see
// ../layers/norm_activation.cpp.
//
// A thread has V neighbouring channels, 16 bytes where they can be read at once, of some rows of
// its block's part. Sums are in fp32 within a part, and then added in fp64. Variances are of the
// distances to the part's first row, so nothing cancels.
#include "norm.cuh"

namespace dafl {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;       // threads at most that share a row of a part
constexpr int kRowsAtOnce = 4;   // whose loads are under way together
constexpr int kSumChannels = 8;  // of a block that adds the parts
constexpr int kSumTurns = kThreads / kSumChannels;

// The rows and channels of a thread.
struct Place {
  int lane, turn, turns;
  int c;  // the first channel, or -1 for a thread that has none
  int64_t begin, end;

  __device__ Place(int64_t rows, int C, int V, int lanes) {
    const int64_t part = norm_part(rows, C);
    lane = threadIdx.x % lanes;
    turn = threadIdx.x / lanes;
    turns = kThreads / lanes;
    c = (blockIdx.y * lanes + lane) * V;
    if (turn >= turns || c >= C) c = -1;
    begin = blockIdx.x * part;
    end = min(rows, begin + part);
  }

  // each(values of x, values of y, where) for the thread's rows. Without y, x is read for it.
  template <class T, class Each>
  __device__ void for_rows(const void* x, const void* y, int C, Each each) const {
    if (c < 0) return;
    for (int64_t row = begin + turn; row < end; row += kRowsAtOnce * turns) {
      T a[kRowsAtOnce], b[kRowsAtOnce];
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (row + k * turns >= end) break;
        const int64_t at = (row + k * turns) * C + c;
        a[k] = T::from(x, at);
        if (y != nullptr) b[k] = T::from(y, at);
      }
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (row + k * turns >= end) break;
        each(a[k], b[k], (row + k * turns) * C + c);
      }
    }
  }
};

// The sums of two numbers of each channel over the turns of a block, by one thread a channel:
// write(channel, sum a, sum b).
template <int V, class Write>
__device__ void add_turns(const Place& place, int lanes, int C, const float (&a)[V],
                          const float (&b)[V], Write write) {
  float* shared = reinterpret_cast<float*>(block_shared());  // [2][turns][lanes * V]
  const int width = lanes * V, size = place.turns * width;
  if (place.turn < place.turns) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int at = place.turn * width + place.lane * V + i;
      shared[at] = a[i];
      shared[size + at] = b[i];
    }
  }
  __syncthreads();
  const int c = blockIdx.y * width + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= width || c >= C) return;
  float first = 0, second = 0;
#pragma unroll 8
  for (int at = threadIdx.x; at < size; at += width) {
    first += shared[at];
    second += shared[size + at];
  }
  write(c, first, second);
}

// parts [parts][2][C]: mean, sum of squared distances to it
template <Dtype D, int V>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const void* x, int64_t rows, int C, int lanes, double* parts) {
  const Place place(rows, C, V, lanes);
  float origin[V] = {}, sum[V] = {}, square[V] = {};
  if (place.c >= 0) {
    const auto first = Values<D, V>::from(x, place.begin * C + place.c);
#pragma unroll
    for (int i = 0; i < V; ++i) origin[i] = first.get(i);
  }
  place.for_rows<Values<D, V>>(x, nullptr, C, [&](const auto& value, const auto&, int64_t) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float distance = value.get(i) - origin[i];
      sum[i] += distance;
      square[i] += distance * distance;
    }
  });
  add_turns<V>(place, lanes, C, sum, square, [&](int c, double s, double q) {
    const double count = static_cast<double>(place.end - place.begin);
    double* to = parts + 2 * blockIdx.x * static_cast<int64_t>(C) + c;
    to[0] = load<double>(x, D, place.begin * C + c) + s / count;
    to[C] = q - s * s / count;
  });
}

// parts [parts][2][C]: sums of the gradient before the activation, and of that times x - mean
template <Dtype D, int V>
__global__ void __launch_bounds__(kThreads)
    norm_sums_kernel(Norm a, const void* grad, int lanes, double* parts) {
  const Place place(a.rows, a.C, V, lanes);
  const Affine<V> affine(a, place.c);
  float mean[V] = {}, sum[V] = {}, product[V] = {};
  if (place.c >= 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) mean[i] = a.mean[place.c + i];
  }
  place.for_rows<Values<D, V>>(a.x, grad, a.C, [&](const auto& x, const auto& g, int64_t) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float value = x.get(i), before = affine.before(i, value, g.get(i), a.slope);
      sum[i] += before;
      product[i] += before * (value - mean[i]);
    }
  });
  add_turns<V>(place, lanes, a.C, sum, product, [&](int c, float s, float p) {
    double* to = parts + 2 * blockIdx.x * static_cast<int64_t>(a.C) + c;
    to[0] = s;
    to[a.C] = p;
  });
}

// Adds two numbers of each channel, of each part, in order: each(part, channel) gives them,
// write(channel, sums) takes them, in one thread a channel.
struct Two {
  double a, b;
};

template <class Each, class Write>
__device__ void add_two(int64_t count, int C, Each each, Write write) {
  Two* shared = reinterpret_cast<Two*>(block_shared());
  const int turn = threadIdx.x / kSumChannels, k = threadIdx.x % kSumChannels;
  const int c = blockIdx.x * kSumChannels + k;
  Two sum{0, 0};
  if (c < C) {
#pragma unroll 8
    for (int64_t part = turn; part < count; part += kSumTurns) {
      const Two more = each(part, c);
      sum = {sum.a + more.a, sum.b + more.b};
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (turn > 0 || c >= C) return;
#pragma unroll
  for (int t = 1; t < kSumTurns; ++t) {
    const Two more = shared[t * kSumChannels + k];
    sum = {sum.a + more.a, sum.b + more.b};
  }
  write(c, sum);
}

__global__ void __launch_bounds__(kThreads)
    moments_sum_kernel(const double* parts, int64_t rows, int C, float* mean, float* variance) {
  const int64_t part = norm_part(rows, C);
  add_two((rows + part - 1) / part, C,
          [&](int64_t p, int c) -> Two {
            const double count = static_cast<double>(min(part, rows - p * part));
            const double distance = parts[2 * p * C + c] - parts[c];
            return {count * distance, count * distance * distance + parts[(2 * p + 1) * C + c]};
          },
          [&](int c, Two sum) {
            const double n = static_cast<double>(rows), distance = sum.a / n;
            const double squares = sum.b / n - distance * distance;
            mean[c] = static_cast<float>(parts[c] + distance);
            variance[c] = static_cast<float>(squares < 0 ? 0 : squares);
          });
}

__global__ void __launch_bounds__(kThreads)
    norm_factors_kernel(Norm a, const double* parts, float* factors, Parameter grad_weight,
                        Parameter grad_bias) {
  const int64_t part = norm_part(a.rows, a.C);
  add_two(
      (a.rows + part - 1) / part, a.C,
      [&](int64_t p, int c) -> Two {
        return {parts[2 * p * a.C + c], parts[(2 * p + 1) * a.C + c]};
      },
      [&](int c, Two sum) { write_factors(a, c, sum.a, sum.b, factors, grad_weight, grad_bias); });
}

template <Dtype D, int V>
__global__ void __launch_bounds__(kThreads) norm_kernel(Norm a, int lanes, void* y) {
  const Place place(a.rows, a.C, V, lanes);
  const Affine<V> affine(a, place.c);
  place.for_rows<Values<D, V>>(a.x, nullptr, a.C, [&](const auto& x, const auto&, int64_t at) {
    Values<D, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float value = affine.normalised(i, x.get(i));
      result.set(i, value > 0 ? value : value * a.slope);
    }
    result.to(y, at);
  });
}

template <Dtype D, int V>
__global__ void __launch_bounds__(kThreads)
    norm_gradient_kernel(Norm a, const void* grad, const float* factors, int lanes, void* grad_x) {
  const Place place(a.rows, a.C, V, lanes);
  const Affine<V> affine(a, place.c);
  float by_x[V] = {}, constant[V] = {};
  if (place.c >= 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      by_x[i] = factors[place.c + i];
      constant[i] = factors[a.C + place.c + i];
    }
  }
  place.for_rows<Values<D, V>>(a.x, grad, a.C, [&](const auto& x, const auto& g, int64_t at) {
    Values<D, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float value = x.get(i), before = affine.before(i, value, g.get(i), a.slope);
      result.set(i, before * affine.scale[i] + (value * by_x[i] + constant[i]));
    }
    result.to(grad_x, at);
  });
}

// ---- Launching ---------------------------------------------------------------------------------

struct Grid {
  int lanes;
  dim3 blocks;

  Grid(int64_t rows, int C, int V) {
    const int vectors = C / V;
    lanes = vectors < kLanes ? vectors : kLanes;
    const int64_t part = norm_part(rows, C);
    blocks = dim3((rows + part - 1) / part, (vectors + lanes - 1) / lanes);
  }
};

constexpr int64_t shared_of(int V) { return int64_t{2} * kThreads * V * 4; }  // of add_turns

dim3 sum_blocks(int C) { return dim3((C + kSumChannels - 1) / kSumChannels); }

}  // namespace

cudaError_t launch_moments(const void* x, Dtype dtype, int64_t rows, int C, double* parts,
                           float* mean, float* variance, cudaStream_t stream) {
  const cudaError_t error = by_kind<4, 8>(
      dtype, C,
      [&](auto kind) {
        using K = decltype(kind);
        const Grid grid(rows, C, K::width);
        return launch(moments_kernel<K::dtype, K::width>, grid.blocks, kThreads, 1,
                      shared_of(K::width), stream, x, rows, C, grid.lanes, parts);
      },
      x);
  if (error != cudaSuccess) return error;
  return launch(moments_sum_kernel, sum_blocks(C), kThreads, 1, kThreads * sizeof(Two), stream,
                parts, rows, C, mean, variance);
}

cudaError_t launch_norm(const Norm& a, void* y, cudaStream_t stream) {
  return by_kind<4, 8>(
      a.dtype, a.C,
      [&](auto kind) {
        using K = decltype(kind);
        const Grid grid(a.rows, a.C, K::width);
        return launch(norm_kernel<K::dtype, K::width>, grid.blocks, kThreads, 1, 0, stream, a,
                      grid.lanes, y);
      },
      a.x, y);
}

cudaError_t launch_norm_backward(const Norm& a, const void* grad, double* parts, float* factors,
                                 void* grad_x, const Parameter& grad_weight,
                                 const Parameter& grad_bias, cudaStream_t stream) {
  return by_kind<4, 8>(
      a.dtype, a.C,
      [&](auto kind) {
        using K = decltype(kind);
        const Grid grid(a.rows, a.C, K::width);
        cudaError_t error = launch(norm_sums_kernel<K::dtype, K::width>, grid.blocks, kThreads, 1,
                                   shared_of(K::width), stream, a, grad, grid.lanes, parts);
        if (error == cudaSuccess) {
          error = launch(norm_factors_kernel, sum_blocks(a.C), kThreads, 1, kThreads * sizeof(Two),
                         stream, a, parts, factors, grad_weight, grad_bias);
        }
        if (error == cudaSuccess) {
          error = launch(norm_gradient_kernel<K::dtype, K::width>, grid.blocks, kThreads, 1, 0,
                         stream, a, grad, factors, grid.lanes, grad_x);
        }
        return error;
      },
      a.x, grad, grad_x);
}

}  // namespace cuda
}  // namespace dafl
