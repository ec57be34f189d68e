// Rows that a warp, a block or a cluster holds in registers.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace dafl {
namespace cuda {

// The columns of a thread, the same for all its rows: vectors of T that lie a group apart, first in
// equal shares to the cluster's blocks.
template <class R, class T>
struct Columns {
  static constexpr int kSize = Vector<T>::kSize;
  static constexpr int kVectors = R::kValues / kSize;

  int first, limit;  // of this thread; of its block's share

  __device__ explicit Columns(int C) : first(threadIdx.x % R::kGroup * kSize), limit(C) {
#if DAFL_CLUSTERS
    if constexpr (R::kCluster) {
      const auto cluster = cooperative_groups::this_cluster();
      const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
      const int share = ((C + kSize - 1) / kSize + blocks - 1) / blocks * kSize;
      first += rank * share;
      limit = min(C, (rank + 1) * share);
    }
#endif
  }

  // Rows lie in the order of the groups. Groups that share a warp go on together, as long as the
  // first of them has a row; a group without one takes part with a row of another's.
  __device__ static bool any(int64_t row, int64_t end) {
    return row - static_cast<int>(threadIdx.x % kWarp) / R::kLanes < end;
  }
  __device__ static bool has(int64_t row, int64_t end) { return R::kLanes == kWarp || row < end; }
  __device__ static int64_t within(int64_t row, int64_t end) {
    return R::kLanes == kWarp ? row : min(row, end - 1);
  }

  // Of a thread's i-th value, from `first`.
  __device__ static constexpr int offset(int i) {
    return i / kSize * R::kGroup * kSize + i % kSize;
  }

  // Columns from the limit on are -inf, which no maximum and no sum of exponentials sees. All loads
  // are under way before the first is used.
  __device__ void load(const Matrix& m, bool vectors, int64_t row, uint4 (&bits)[kVectors]) const {
    constexpr unsigned low = Vector<T>::kLowest;
    if (vectors) {
      const int64_t start = row * m.row_stride + first;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        bits[v] = make_uint4(low, low, low, low);
        if (first + offset(v * kSize) < limit) {
          bits[v] = load_vector<T>(m.data, start + offset(v * kSize));
        }
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = first + offset(v * kSize);
        bits[v] = gather_vector<T>(m, row, column, limit - column);
      }
    }
  }

  // Asks for a row that `load` will read in vectors: it travels to the L2 cache meanwhile.
  __device__ void prefetch(const Matrix& m, int64_t row) const {
#ifdef __CUDA_ARCH__
    const char* from = static_cast<const char*>(m.data) + (row * m.row_stride + first) * sizeof(T);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const char* at = from + offset(v * kSize) * sizeof(T);
      if (first + offset(v * kSize) < limit) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
    }
#endif
  }

  __device__ static void unpack_all(const uint4 (&bits)[kVectors], float (&x)[R::kValues]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) unpack<T>(bits[v], x + v * kSize);
  }

  // The maximum of this thread's columns, and of each of its vectors; no number at all: -FLT_MAX.
  __device__ static float maximum(const float (&x)[R::kValues], float (&best)[kVectors]) {
    float all = -FLT_MAX;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      best[v] = -FLT_MAX;
#pragma unroll
      for (int j = 0; j < kSize; ++j) best[v] = fmaxf(best[v], x[v * kSize + j]);
      all = fmaxf(all, best[v]);
    }
    return all;
  }

  // The lowest of this thread's columns that reach `top`, INT_MAX if none does, and how many do.
  // Few vectors hold one, and the others are passed over.
  __device__ int lowest(const float (&x)[R::kValues], const float (&best)[kVectors], float top,
                        int* ties) const {
    int at = INT_MAX;
#pragma unroll
    for (int v = kVectors - 1; v >= 0; --v) {
      if (best[v] != top) continue;
#pragma unroll
      for (int j = kSize - 1; j >= 0; --j) {
        if (x[v * kSize + j] == top) {
          at = first + offset(v * kSize + j);
          ++*ties;
        }
      }
    }
    return at;
  }

  // Into a contiguous [N, C] gradient of any dtype.
  __device__ void store_row(void* grad, Dtype dtype, bool vectors, int64_t row, int64_t C,
                            const float (&x)[R::kValues]) const {
    const int64_t start = row * C + first;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = offset(v * kSize);
      const uint4 bits = pack<T>(x + v * kSize);
      if (first + at >= limit) continue;
      if (vectors) {
        store_vector<T>(grad, start + at, bits);
      } else {
        scatter_vector<T>(grad, dtype, start + at, bits, limit - first - at);
      }
    }
  }
};

// Whether the next row fits the registers beside the current one. If not, it comes from the L2
// cache.
template <class T>
constexpr bool kAhead = sizeof(T) == 2;

// call(Rows<...>) with the plan's.
template <class Call>
cudaError_t with_rows(const Plan& plan, Call call) {
  constexpr int k = kOwnColumns;
  if (plan.regime == Regime::warp) {
    return plan.group == kWarp ? call(Rows<kWarp, k, false, 2>()) : call(Rows<8, k, false, 2>());
  }
  if (plan.regime == Regime::block) {
    return plan.group == 128 ? call(Rows<128, k, false, 4>()) : call(Rows<512, k, false, 1>());
  }
  return call(Rows<512, k, true, 1>());
}

}  // namespace cuda
}  // namespace dafl
