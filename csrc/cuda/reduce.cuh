// Sums over rows and launches, the activation loss, and the launch of kernels.
#pragma once

#include "group.cuh"

namespace dafl {
namespace cuda {

// A maximum and the lowest index that reaches it. A NaN is passed over here and met by the sums
// that follow.
template <class S>
struct Best {
  S value;
  int index;

  __device__ void take(S x, int at) {
    if (x > value || (x == value && at < index)) {
      value = x;
      index = at;
    }
  }
};

template <class S>
__device__ Best<S> block_best(Block<kStreamThreads>& block, Best<S> best) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const S value = shuffle(best.value, mask);
    best.take(value, __shfl_xor_sync(kAllLanes, best.index, mask));
  }
  Best<S> heard[1];
  block.tell(best, {lowest(S(0)), INT_MAX}, heard);
  best = heard[0];
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const S value = shuffle(best.value, mask);
    best.take(value, __shfl_xor_sync(kAllLanes, best.index, mask));
  }
  return best;
}

// ---- Parts -------------------------------------------------------------------------------------

// What the parts of plan.h leave in scratch: each one its sums of p [C] in S, then of scalars in
// fp64; behind all parts two numbers per 32 columns.
template <class S>
struct Parts {
  char* base;
  int64_t C, bytes;

  __device__ Parts(void* scratch, int64_t C)
      : base(static_cast<char*>(scratch)), C(C), bytes(part_bytes(C, sizeof(S))) {}
  __device__ S* columns(int64_t part) const { return reinterpret_cast<S*>(base + part * bytes); }
  __device__ double* scalars(int64_t part) const {
    return reinterpret_cast<double*>(base + (part + 1) * bytes) - kPartScalars;
  }
  __device__ double* behind(int64_t parts) const {
    return reinterpret_cast<double*>(base + parts * bytes);
  }
};

// The sum of one column over `count` parts, in a block of kAddThreads whose lanes stand for 32
// columns: get(part) is this lane's. Each warp adds every 8th part, then all add the 8 sums.
template <class Get>
__device__ double add_columns(int64_t count, double* shared, Get get) {
  constexpr int kWarps = kAddThreads / kWarp;
  double sum = 0;
#pragma unroll 16
  for (int64_t p = threadIdx.x / kWarp; p < count; p += kWarps) sum += get(p);
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = shared[threadIdx.x % kWarp];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += shared[w * kWarp + threadIdx.x % kWarp];
  return sum;
}

// n sums over i < count in a block of kAddThreads: get(i, k), added to `sums`, which all threads
// get.
template <int n, class Get>
__device__ void add_scalars(int64_t count, Block<kAddThreads>& block, double (&sums)[n], Get get) {
  for (int64_t i = threadIdx.x; i < count; i += kAddThreads) {
#pragma unroll
    for (int k = 0; k < n; ++k) sums[k] += get(i, k);
  }
#pragma unroll
  for (int k = 0; k < n; ++k) sums[k] = block.sum(sums[k]);
}

// sum p_bar log p_bar, in nats, from the means of any number of classes. A mean next to 1 has lost
// how far away it is, so the logarithm of one above 3/4 is taken from the rest's sum.
struct Entropy {
  double p_log_p, rest;  // of the means up to 3/4

  __device__ Entropy(double p_log_p, double rest) : p_log_p(p_log_p), rest(rest) {}
  __device__ static Entropy of(double mean, double log_mean) {
    return mean > 0.75 ? Entropy(0, 0) : Entropy(mean * log_mean, mean);
  }
  __device__ Entropy lane_sums() const { return Entropy(lane_sum(p_log_p), lane_sum(rest)); }
  __device__ double total() const {
    return rest < 0.25 ? p_log_p + (1 - rest) * log1p_of(-rest) : p_log_p;
  }
};

// ---- Activation loss ---------------------------------------------------------------------------

// body(i, x) for the calling threads' share of the N * F features: elements i to i + kSize of
// [N, F] in a vector of T, 0 behind the end. `threads` of a block take part, this one is `thread`.
// The share is cut by the grid, whatever the rows' own partition is. How features lie in memory
// chooses how they are read, not what is computed.
template <class T, class Body>
__device__ void for_features(const Matrix& f, int64_t N, int64_t F, int thread, int threads,
                             Body body) {
  constexpr int kSize = Vector<T>::kSize, kAtOnce = 4;
  const int64_t total = N * F, step = static_cast<int64_t>(threads) * gridDim.x * kSize;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * threads + thread) * kSize;
  const Matrix flat{f.data, 0, f.col_stride, f.dtype};
  if (f.row_stride == F && has_vectors<T>(flat, total)) {
    for (; i < total; i += kAtOnce * step) {
      uint4 bits[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        bits[j] = make_uint4(0, 0, 0, 0);
        if (i + j * step < total) bits[j] = load_vector<T>(f.data, i + j * step);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        float x[kSize];
        unpack<T>(bits[j], x);
        body(i + j * step, x);
      }
    }
  } else {
    for (; i < total; i += step) {
      float x[kSize];
      for (int j = 0; j < kSize; ++j) {
        x[j] = i + j < total ? load<float>(f, (i + j) / F, (i + j) % F) : 0.0f;
      }
      body(i, x);
    }
  }
}

// This thread's part of the sum of |f|, in fp32 over a vector and in fp64 from there on, and where
// `grad` is wanted, [N, F] contiguous, grad = value * sign(f). T: the features' dtype, or float.
template <class T>
__device__ double activation_in(const Matrix& f, int64_t N, int64_t F, double value, void* grad,
                                int thread, int threads) {
  const int64_t total = N * F;
  double sum = 0;
  if (f.dtype == Dtype::f64) {
    const int64_t step = static_cast<int64_t>(threads) * gridDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + thread; i < total; i += step) {
      const double x = load<double>(f, i / F, i % F);
      sum += fabs(x);
      if (grad != nullptr) store(grad, f.dtype, i, x > 0 ? value : x < 0 ? -value : 0.0);
    }
    return sum;
  }
  constexpr int kSize = Vector<T>::kSize;
  const float up = static_cast<float>(value);
  const bool vectors = f.dtype == Vector<T>::kDtype && total % kSize == 0;
  for_features<T>(f, N, F, thread, threads, [&](int64_t i, const float (&x)[kSize]) {
    float piece = 0, y[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      piece += fabsf(x[j]);
      y[j] = x[j] > 0 ? up : x[j] < 0 ? -up : 0.0f;
    }
    sum += static_cast<double>(piece);
    if (grad == nullptr) return;
    if (vectors) {
      if (i < total) store_vector<T>(grad, i, pack<T>(y));
    } else {
      for (int j = 0; j < kSize && i + j < total; ++j) store(grad, f.dtype, i + j, y[j]);
    }
  });
  return sum;
}

__device__ inline double activation(const Matrix& f, int64_t N, int64_t F, double value, void* grad,
                                    int thread, int threads) {
  if (f.dtype == Dtype::bf16) {
    return activation_in<__nv_bfloat16>(f, N, F, value, grad, thread, threads);
  }
  if (f.dtype == Dtype::f16) return activation_in<__half>(f, N, F, value, grad, thread, threads);
  return activation_in<float>(f, N, F, value, grad, thread, threads);
}

// ---- Launching ---------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int cluster,
                   int64_t shared, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  // The launch's own error, and no older one of somebody else. It is taken from where CUDA keeps
  // it, so that the caller's next check does not find it a second time.
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// call(type) with a value of the element type that `dtype` stands for; float for what is no
// element of Vector.
template <class Call>
auto with_type(Dtype dtype, Call call) {
  if (dtype == Dtype::bf16) return call(__nv_bfloat16());
  if (dtype == Dtype::f16) return call(__half());
  return call(float());
}

}  // namespace cuda
}  // namespace dafl
