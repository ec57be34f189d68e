// Tiles of up to 32 classes in shared memory, a thread a row.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace dafl {
namespace cuda {

// A tile kernel's shared memory, as plan.h counts it.
struct TileShared {
  double* sums;      // [kTileWidth], this block's
  double* gathered;  // [kTileCluster][kTileWidth], all blocks' of the cluster
  float* first;      // [kTileRows][pitch]
  float* second;     // the same for the distillation loss
  double* scratch;   // for add_parts, over the tiles

  __device__ TileShared(char* shared, int pitch) {
    sums = reinterpret_cast<double*>(shared + kReduceBytes);
    gathered = sums + kTileWidth;
    first = reinterpret_cast<float*>(sums + kTileSums);
    second = first + kTileRows * pitch;
    scratch = sums + kTileSums;
  }
};

// `rows` rows from `row` on: consecutive threads read consecutive elements.
__device__ inline void load_tile(const Matrix& m, int64_t row, int rows, int C, float* tile) {
  const int pitch = tile_pitch(C);
  const int64_t start = row * m.row_stride;
#pragma unroll 4
  for (int e = threadIdx.x; e < rows * C; e += blockDim.x) {
    const int r = e / C, k = e - r * C;
    tile[r * pitch + k] = load<float>(m.data, m.dtype, start + r * m.row_stride + k * m.col_stride);
  }
}

__device__ inline void store_tile(void* grad, Dtype dtype, int64_t row, int rows, int C,
                                  const float* tile) {
  const int pitch = tile_pitch(C);
  for (int e = threadIdx.x; e < rows * C; e += blockDim.x) {
    const int r = e / C, k = e - r * C;
    store(grad, dtype, row * C + e, tile[r * pitch + k]);
  }
}

// sums[k] += the tile's column k. A warp a column; 4 rows a lane, then a tree over the lanes.
__device__ inline void add_columns(const float* tile, int rows, int C, double* sums) {
  const int pitch = tile_pitch(C), lane = threadIdx.x % kWarp;
  for (int k = threadIdx.x / kWarp; k < C; k += kTileThreads / kWarp) {
    float sum = 0;
#pragma unroll
    for (int r = lane; r < kTileRows; r += kWarp) {
      if (r < rows) sum += tile[r * pitch + k];
    }
    sum = warp_reduce(sum, Add());
    if (lane == 0) sums[k] += static_cast<double>(sum);
  }
}

// Maximum and lowest-index argmax of a row that one thread owns.
__device__ inline Best<float> row_best(const float* x, int C) {
  Best<float> best{x[0], 0};
  for (int k = 1; k < C; ++k) {
    if (x[k] > best.value) best = {x[k], k};
  }
  return best;
}

// The cluster's sums, added in the order of its blocks: for the one-launch kernels. All threads of
// all blocks call it once, after `sums` is complete and the blocks have met before.
__device__ inline void gather_sums(const TileShared& shared, int width) {
#if DAFL_CLUSTERS
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  for (int i = threadIdx.x; i < blocks * kTileWidth; i += blockDim.x) {
    const int to = i / kTileWidth, k = i % kTileWidth;
    double* remote = cluster.map_shared_rank(shared.gathered, to);
    if (k < width) remote[rank * kTileWidth + k] = shared.sums[k];
  }
  cluster.sync();  // every block has written to every block
#endif
}

__device__ inline double gathered_sum(const TileShared& shared, int k) {
  double sum = shared.gathered[k];
  for (int r = 1; r < kTileCluster; ++r) sum += shared.gathered[r * kTileWidth + k];
  return sum;
}

// Before gather_sums: no block may write to one that does not run yet.
__device__ inline void meet_cluster() {
#if DAFL_CLUSTERS
  cooperative_groups::this_cluster().sync();
#endif
}

// Of tile_losses.cu, for generator_loss.cu.
cudaError_t launch_generator_forward_tile(const GeneratorForward& args, const Plan& plan,
                                          cudaStream_t stream);
cudaError_t launch_generator_backward_tile(const GeneratorBackward& args, const Plan& plan,
                                           cudaStream_t stream);

}  // namespace cuda
}  // namespace dafl
