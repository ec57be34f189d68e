// Sums and maxima in fixed order over a warp, a block or a cluster, the activation loss, and the
// launch of kernels whose groups of threads share a row.
//
// Order is fixed everywhere: a warp's butterfly adds the same pairs in every lane, and what crosses
// warps, blocks or launches is written to memory and added by index. No atomics, so the same bits
// on every run.
#pragma once

#include <cooperative_groups.h>

#include <cstring>

#include "memory.cuh"
#include "plan.h"

// Kernels with clusters are compiled for every architecture but exist only where clusters do; the
// planner chooses them nowhere else. (Undefined: the host's half, where nothing runs.)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DAFL_CLUSTERS 1
#else
#define DAFL_CLUSTERS 0
#endif

namespace dafl {
namespace cuda {

// The block's dynamic shared memory; plan.h says how much there is.
__device__ inline char* block_shared() {
  extern __shared__ __align__(16) char dafl_shared[];
  return dafl_shared;
}

// ---- Reductions --------------------------------------------------------------------------------

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Pair {
  float a, b;
};

struct AddPairs {
  __device__ Pair operator()(Pair x, Pair y) const { return {x.a + y.a, x.b + y.b}; }
};

// A maximum and the lowest index that reaches it. A NaN is passed over here and met by the sums
// that follow.
template <class S>
struct Best {
  S value;
  int index;
};

struct Better {
  template <class S>
  __device__ Best<S> operator()(Best<S> a, Best<S> b) const {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }
};

struct BestPair {
  Best<float> a, b;
};

struct BetterPairs {
  __device__ BestPair operator()(BestPair x, BestPair y) const {
    return {Better()(x.a, y.a), Better()(x.b, y.b)};
  }
};

template <class T, class Op>
__device__ T warp_reduce(T value, Op op) {
  static_assert(sizeof(T) % 4 == 0, "shuffled by words");
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    unsigned words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (unsigned i = 0; i < sizeof(T) / 4; ++i) {
      words[i] = __shfl_xor_sync(0xffffffffu, words[i], mask);
    }
    T other;
    memcpy(&other, words, sizeof(T));
    value = op(value, other);
  }
  return value;
}

// The threads that work on one row: a warp, a block, or the blocks of a cluster. `reduce` gives
// every one of them the same bits; all of them must call it together.
//
// Two sets of slots in shared memory take turns, so that one barrier a reduction is enough: who
// writes a set again has passed the barrier of the reduction between, and that barrier is passed
// only by threads that have done reading the set before.
template <int kThreads, bool kCluster>
struct Group {
  int thread;  // in the group
  char* slots;
  int turn = 0;

  __device__ explicit Group(char* shared) : slots(shared) {
    thread = threadIdx.x % kThreads;
#if DAFL_CLUSTERS
    if constexpr (kCluster) {
      const auto cluster = cooperative_groups::this_cluster();
      thread += cluster.block_rank() * kThreads;
      // No block may write to another's shared memory before that one runs. Afterwards none can
      // leave too early: its last reduction's barrier comes after all writes to it.
      cluster.sync();
    }
#endif
  }

  template <class T, class Op>
  __device__ T reduce(T value, Op op) {
    static_assert(sizeof(T) <= 16 && kThreads <= 512, "kSlotBytes");
    value = warp_reduce(value, op);
    if constexpr (kThreads > kWarp) {
      constexpr int kWarps = kThreads / kWarp;
      T* own = reinterpret_cast<T*>(slots + turn * kSlotBytes);
      turn ^= 1;
      if (threadIdx.x % kWarp == 0) own[threadIdx.x / kWarp] = value;
      __syncthreads();
      value = own[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) value = op(value, own[w]);
#if DAFL_CLUSTERS
      if constexpr (kCluster) {
        // Every block tells every block, then all read their own memory.
        const auto cluster = cooperative_groups::this_cluster();
        const unsigned blocks = cluster.num_blocks();
        T* ranks = own + kWarps;
        if (threadIdx.x < blocks) {
          cluster.map_shared_rank(ranks, threadIdx.x)[cluster.block_rank()] = value;
        }
        cluster.sync();
        value = ranks[0];
        for (unsigned r = 1; r < blocks; ++r) value = op(value, ranks[r]);
      }
#endif
    }
    return value;
  }

  template <class T>
  __device__ T sum(T value) {
    return reduce(value, Add());
  }
};

// The sum of one column over all parts, in a block of 256 threads whose lanes stand for 32
// columns: each warp adds every 8th part, then all add the 8 sums. `column` < 0: nothing to add.
__device__ inline double add_parts(const double* parts, int64_t count, int64_t width,
                                   int64_t column, double* shared) {
  const int lane = threadIdx.x % kWarp;
  double sum = 0;
  if (column >= 0) {
#pragma unroll 8
    for (int64_t p = threadIdx.x / kWarp; p < count; p += 8) sum += parts[p * width + column];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = shared[lane];
#pragma unroll
  for (int slice = 1; slice < 8; ++slice) sum += shared[slice * kWarp + lane];
  __syncthreads();  // before the next call overwrites
  return sum;
}

// ---- Activation loss ---------------------------------------------------------------------------

// f(i, quad) or f(i, value) over this block's share of the N * F features; i: index in [N, F].
// The share is cut by the grid, in fours, whatever the rows' own partition is.
template <class Quad, class Single>
__device__ void for_features(const Matrix& features, int64_t N, int64_t F, Quad quad,
                             Single single) {
  const int64_t total = N * F;
  const int64_t share = (total + 4 * static_cast<int64_t>(gridDim.x) - 1) / (4 * gridDim.x) * 4;
  const int64_t begin = share * blockIdx.x;
  const int64_t end = begin + share < total ? begin + share : total;
  const Matrix flat{features.data, 0, features.col_stride, features.dtype};
  if (features.row_stride == F && has_quads(flat, total)) {
#pragma unroll 4
    for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * blockDim.x) {
      quad(i, load_quad(features.data, features.dtype, i));
    }
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      single(i, load<double>(features, i / F, i % F));
    }
  }
}

// This thread's part of the sum of |f|: quads in fp32, 256 elements at most, then in fp64.
__device__ inline double abs_sum(const Matrix& features, int64_t N, int64_t F) {
  double sum = 0;
  float piece = 0;
  int count = 0;
  for_features(
      features, N, F,
      [&](int64_t, float4 v) {
        piece += (fabsf(v.x) + fabsf(v.y)) + (fabsf(v.z) + fabsf(v.w));
        if (++count % 64 == 0) {
          sum += piece;
          piece = 0;
        }
      },
      [&](int64_t, double v) { sum += fabs(v); });
  return sum + piece;
}

__device__ inline double signed_like(double value, double x) {
  return x > 0 ? value : (x < 0 ? -value : 0.0);
}

// grad = value * sign(f)
__device__ inline void sign_gradient(const Matrix& features, int64_t N, int64_t F, double value,
                                     void* grad) {
  const float up = static_cast<float>(value);
  const Dtype dtype = features.dtype;
  for_features(
      features, N, F,
      [&](int64_t i, float4 v) {
        const auto sign = [&](float x) { return x > 0 ? up : (x < 0 ? -up : 0.0f); };
        store_quad(grad, dtype, i, make_float4(sign(v.x), sign(v.y), sign(v.z), sign(v.w)));
      },
      [&](int64_t i, double x) { store(grad, dtype, i, signed_like(value, x)); });
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

// The kernels that hold a row in registers: how many threads share it, how many quads each owns,
// and the blocks that a multiprocessor should have room for, which bounds a thread's registers.
template <int kGroup_, int kQuads_, bool kCluster_, int kBlocks_>
struct Rows {
  static constexpr int kGroup = kGroup_;
  static constexpr int kQuads = kQuads_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = kGroup == kWarp ? kWarpsPerBlock * kWarp : kGroup;
  static constexpr int kGroups = kThreads / kGroup;  // rows that a block has at a time
  static constexpr int kValues = 4 * kQuads;
};

// Part `part` of plan.h: its rows go to the block's (or the cluster's) groups in turn, and each
// row's columns to the group's threads, first in equal shares to the cluster's blocks.
template <class R>
struct PartOfRows {
  int64_t part, first, end;
  Columns own;

  __device__ PartOfRows(int64_t N, int C, int64_t part_rows) {
    part = blockIdx.x;
    own = {static_cast<int>(threadIdx.x % R::kGroup) * 4, C};
#if DAFL_CLUSTERS
    if constexpr (R::kCluster) {
      const auto cluster = cooperative_groups::this_cluster();
      const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
      const int share = ((C + 3) / 4 + blocks - 1) / blocks * 4;
      part /= blocks;
      own.first += rank * share;
      own.limit = min(C, (rank + 1) * share);
    }
#endif
    first = part * part_rows + threadIdx.x / R::kGroup;
    end = min(N, (part + 1) * part_rows);
  }
};

// call(Rows<...>) with the plan's.
template <class Call>
cudaError_t with_rows(const Plan& plan, Call call) {
  if (plan.regime == Regime::warp) {
    return plan.quads == 2 ? call(Rows<kWarp, 2, false, 4>()) : call(Rows<kWarp, 8, false, 2>());
  }
  if (plan.regime == Regime::block) {
    return plan.quads == 4 ? call(Rows<256, 4, false, 3>()) : call(Rows<512, 8, false, 1>());
  }
  return call(Rows<512, 8, true, 1>());
}

}  // namespace cuda
}  // namespace dafl
