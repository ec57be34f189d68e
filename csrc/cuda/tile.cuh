// Up to 32 classes: a row is one thread's, in registers.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace dafl {
namespace cuda {

// A row of C <= kC logits; behind them -inf, which no maximum and no sum of exponentials sees.
template <int kC>
__device__ void load_tile_row(const Matrix& m, int64_t row, int C, float (&x)[kC]) {
  const int64_t start = row * m.row_stride;
  if (m.dtype == Dtype::f32) {
    const float* from = static_cast<const float*>(m.data) + start;
#pragma unroll
    for (int k = 0; k < kC; ++k) x[k] = k < C ? from[k * m.col_stride] : lowest(0.0f);
    return;
  }
  const unsigned short* from = static_cast<const unsigned short*>(m.data) + start;
  unsigned short bits[kC];
  const bool words = m.col_stride == 1 && C % 2 == 0 && m.row_stride % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(m.data) % 4 == 0;
  if (words) {
#pragma unroll
    for (int k = 0; k < kC; k += 2) {
      const unsigned word = k < C ? *reinterpret_cast<const unsigned*>(from + k) : 0;
      bits[k] = static_cast<unsigned short>(word);
      bits[k + 1] = static_cast<unsigned short>(word >> 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kC; ++k) {
      bits[k] = k < C ? from[k * m.col_stride] : static_cast<unsigned short>(0);
    }
  }
#pragma unroll
  for (int k = 0; k < kC; ++k) x[k] = k < C ? decode16(bits[k], m.dtype) : lowest(0.0f);
}

// Into a contiguous [N, C] gradient.
template <int kC>
__device__ void store_tile_row(void* grad, Dtype dtype, int64_t row, int C, const float (&x)[kC]) {
  if (dtype == Dtype::f32) {
    float* to = static_cast<float*>(grad) + row * C;
#pragma unroll
    for (int k = 0; k < kC; ++k) {
      if (k < C) to[k] = x[k];
    }
    return;
  }
  unsigned short* to = static_cast<unsigned short*>(grad) + row * C;
#pragma unroll
  for (int k = 0; k < kC; k += 2) {
    const unsigned short low = encode16(x[k], dtype), high = encode16(x[k + 1], dtype);
    if (C % 2 == 0) {
      if (k < C) *reinterpret_cast<unsigned*>(to + k) = low | static_cast<unsigned>(high) << 16;
    } else {
      if (k < C) to[k] = low;
      if (k + 1 < C) to[k + 1] = high;
    }
  }
}

// Maximum and lowest-index argmax; no number at all: -FLT_MAX and -1.
template <int kC>
__device__ float row_best(const float (&x)[kC], int* index) {
  float best = -FLT_MAX;
#pragma unroll
  for (int k = 0; k < kC; ++k) best = fmaxf(best, x[k]);
  *index = -1;
#pragma unroll
  for (int k = kC - 1; k >= 0; --k) {
    if (x[k] == best) *index = k;
  }
  return best;
}

// A warp's sums of kC numbers a lane, as 32 values, one a lane: lane l has that of column
// tile_column<kC>(l). Every step halves what is left, so that it takes kC shuffles instead of 5 kC.
template <int kC>
__device__ float warp_columns(float (&x)[kC]) {
  const int lane = threadIdx.x % kWarp;
  int mask = kWarp / 2;
#pragma unroll
  for (int half = kC / 2; half > 0; half /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? x[i + half] : x[i], give = upper ? x[i] : x[i + half];
      x[i] = keep + shuffle(give, mask);
    }
    mask /= 2;
  }
#pragma unroll
  for (; mask > 0; mask /= 2) x[0] += shuffle(x[0], mask);
  return x[0];
}

template <int kC>
__device__ int tile_column(int lane) {
  return lane / (kWarp / kC);
}

// A tile kernel's shared memory, as plan.h counts it. A width has C sums, then scalars.
struct TileShared {
  double* warps;     // [16][kTileWidth]
  double* gathered;  // [kTileCluster][kTileWidth], of the cluster's blocks
  uint64_t* box;     // of the messages that fill `gathered`
  float* slope;      // [kTileClasses]

  __device__ explicit TileShared(char* shared)
      : warps(reinterpret_cast<double*>(shared)),
        gathered(warps + 16 * kTileWidth),
        box(reinterpret_cast<uint64_t*>(gathered + kTileCluster * kTileWidth)),
        slope(reinterpret_cast<float*>(box + 1)) {}

  // This warp's sums: of its column, and of scalars that are summed over its lanes.
  template <int kC, int n>
  __device__ void put(float column_sum, int C, const double (&scalars)[n]) const {
    const int lane = threadIdx.x % kWarp, column = tile_column<kC>(lane);
    double* own = warps + threadIdx.x / kWarp * kTileWidth;
    if (column < C && lane % (kWarp / kC) == 0) own[column] = static_cast<double>(column_sum);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const double sum = lane_sum(scalars[i]);
      if (lane == 0) own[C + i] = sum;
    }
  }

  // Of the block's warps, for number k, behind a barrier after put.
  __device__ double block_sum(int k) const {
    double sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum += warps[w * kTileWidth + k];
    return sum;
  }

  // The blocks of a cluster meet before the first message: none may be sent to one that does not
  // run yet. In two halves, so that work can stand between.
  __device__ void begin_meeting() const {
#if DAFL_CLUSTERS
    if (threadIdx.x == 0) mailbox_open(box);
    cooperative_groups::this_cluster().barrier_arrive();
#endif
  }
  __device__ void end_meeting() const {
#if DAFL_CLUSTERS
    cooperative_groups::this_cluster().barrier_wait();
#endif
  }

  // Tells the first `width` of this block's sums to all blocks of the cluster, behind a barrier
  // after put. All threads call both; after `receive` all blocks' sums are there.
  __device__ void send(int width) const {
#if DAFL_CLUSTERS
    const auto cluster = cooperative_groups::this_cluster();
    const int k = threadIdx.x;
    if (k == 0) mailbox_expect(box, kTileCluster * width * sizeof(double));
    if (k < width) {
      const double sum = block_sum(k);
      for (int r = 0; r < kTileCluster; ++r) {
        mailbox_send(gathered + cluster.block_rank() * kTileWidth + k, sum, box, r);
      }
    }
#endif
  }
  __device__ void receive() const {
#if DAFL_CLUSTERS
    mailbox_wait(box, 0);
#endif
  }

  // In the order of the blocks.
  __device__ double gathered_sum(int k) const {
    double sum = gathered[k];
#pragma unroll
    for (int r = 1; r < kTileCluster; ++r) sum += gathered[r * kTileWidth + k];
    return sum;
  }
};

// Which of a block's threads have rows, and which features. In the one launch they work side by
// side; otherwise every thread has rows first, then features.
template <bool kOneLaunch, int kC>
struct TileRoles {
  static constexpr int kThreads = kOneLaunch ? one_launch_threads(kC) : kTileThreads;
  static constexpr int kRowThreads = kOneLaunch ? kTileRows : kTileThreads;
  static constexpr int kFeatureThreads = kOneLaunch ? kThreads - kRowThreads : kThreads;

  static __device__ bool has_rows() { return threadIdx.x < kRowThreads; }
  static __device__ bool has_features() { return !kOneLaunch || threadIdx.x >= kRowThreads; }
  static __device__ int feature_thread() {
    return static_cast<int>(threadIdx.x) - (kOneLaunch ? kRowThreads : 0);
  }
};

// First row of a thread in launches without parts: warps go to the blocks in turn, so that few rows
// are spread over many multiprocessors.
__device__ inline int64_t spread_row() {
  return (static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x + blockIdx.x) * kWarp +
         threadIdx.x % kWarp;
}

// In fp32, which is less work than in fp64 and good enough: see Entropy for means next to 1.
__device__ inline double log_of_mean(double mean) {
  return static_cast<double>(log_or_zero(static_cast<float>(mean)));
}

template <class Call>
cudaError_t with_columns(int64_t C, Call call) {
  if (C <= 16) return call(std::integral_constant<int, 16>());
  return call(std::integral_constant<int, kTileClasses>());
}

// Of tile_losses.cu, for generator_loss.cu.
cudaError_t launch_generator_forward_tile(const GeneratorForward& args, const Plan& plan,
                                          cudaStream_t stream);
cudaError_t launch_generator_backward_tile(const GeneratorBackward& args, const Plan& plan,
                                           cudaStream_t stream);

}  // namespace cuda
}  // namespace dafl
