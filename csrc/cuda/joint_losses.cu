// Both losses of a training step and all their gradients, for an upstream gradient of 1 and up to
// 32 classes: generator_loss.cu and distill_loss.cu have the formulas.
//
// Fused: teacher and student logits are read together, each row's softmaxes are formed once in
// shared memory, and losses and gradients leave from there. No row statistics are written.
//
// The student's and the features' gradients are a row's own affair. The teacher's needs p_bar, the
// mean over all rows:
//   N <= 1024, GPU with clusters: one launch. Eight blocks hold all rows in shared memory, tell
//   each
//     other their sums, wait once for that at the cluster's barrier, and write. 4 E bytes moved,
//     E = N C bytes-per-logit.
//   otherwise: two launches. The second starts when all sums are written; each of its blocks adds
//     them for itself, in the same order, and forms the rows anew from logits that the L2 cache
//     still has. 5 E bytes.
// In the first launch the features are read, and again from the cache, and their gradient written.
#include "distill_row.cuh"
#include "generator_row.cuh"

namespace dafl {
namespace cuda {
namespace {

// Parts in scratch: [parts][C + kPartScalars].
enum { kOneHot, kAbs, kKl, kAgreeing };

// One warp, a lane a class: p_bar's slope, and from block 0 the losses.
__device__ void finish(const JointLosses& a, double sum_of_p, const double (&scalars)[4],
                       float* slope) {
  const int lane = threadIdx.x;
  const GeneratorFactors factors(1.0, a.terms);
  const double mean = lane < a.C ? sum_of_p / static_cast<double>(a.N) : 0.0;
  slope[lane] = lane_slope(static_cast<float>(mean), static_cast<float>(factors.slope));
  if (blockIdx.x != 0) return;  // the whole warp
  const double p_log_p = warp_reduce(mean * log_or_zero(mean), Add());
  if (lane == 0) {
    write_generator_losses<float>(a.terms, scalars[kOneHot], scalars[kAbs], p_log_p, a.losses);
    write_distill_losses<float>(a.N, a.distill_scale, scalars[kKl], scalars[kAgreeing],
                                a.losses + 4);
  }
}

template <bool kOneLaunch>
__global__ void __launch_bounds__(kTileThreads, 4)
    joint_losses_tile_kernel(JointLosses a, int64_t part_rows) {
  const int C = static_cast<int>(a.C), pitch = tile_pitch(C);
  const TileShared shared(block_shared(), pitch);
  Group<kTileThreads, false> block(block_shared());
  if constexpr (kOneLaunch) meet_cluster();
  for (int k = threadIdx.x; k < kTileWidth; k += kTileThreads) shared.sums[k] = 0;
  const float scale = static_cast<float>(a.inverse_temperature);
  const float factor = static_cast<float>(a.distill_grad_scale * a.terms.per_row);
  const GeneratorFactors factors(1.0, a.terms);

  const int64_t begin = min(a.N, blockIdx.x * part_rows), end = min(a.N, begin + part_rows);
  const int mine = threadIdx.x;
  float* const t = shared.first + mine * pitch;
  float* const s = shared.second + mine * pitch;
  GeneratorRow row{};
  double loss = 0, kl = 0, agreeing = 0;
  for (int64_t at = begin; at < end; at += kTileRows) {  // once, in one launch
    const int rows = static_cast<int>(min(end - at, static_cast<int64_t>(kTileRows)));
    load_tile(a.teacher, at, rows, C, shared.first);
    load_tile(a.student, at, rows, C, shared.second);
    __syncthreads();  // rows were loaded by all threads, and belong to one from here on
    if (mine < rows) {
      const DistillRow pair = distill_row(s, t, C, scale);
      kl += distill_row_kl<true>(s, t, C, pair, scale, factor);
      agreeing += pair.student.index == pair.teacher.index ? 1 : 0;
      row = generator_row(t, C);
      loss += log1p_of(row.others);
    }
    __syncthreads();  // columns are read and rows stored by all threads; sums[] is cleared
    add_columns(shared.first, rows, C, shared.sums);
    store_tile(a.grad_student, a.student.dtype, at, rows, C, shared.second);
    __syncthreads();  // before the next tile overwrites this one
  }
  double abs = 0;
  if (a.terms.F > 0) {
    abs = abs_sum(a.terms.features, a.N, a.terms.F);
    sign_gradient(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features);
  }
  loss = block.sum(loss);
  abs = block.sum(abs);
  kl = block.sum(kl);
  agreeing = block.sum(agreeing);
  if (threadIdx.x == 0) {
    double* scalars = shared.sums + C;
    scalars[kOneHot] = loss;
    scalars[kAbs] = abs;
    scalars[kKl] = kl;
    scalars[kAgreeing] = agreeing;
  }
  __syncthreads();  // sums[] is complete

  const int width = C + kPartScalars;
  if constexpr (kOneLaunch) {
    gather_sums(shared, width);
    // In place of this block's own sums, which every block has by now.
    float* slope = reinterpret_cast<float*>(shared.sums);
    if (threadIdx.x < kWarp) {
      const int lane = threadIdx.x;
      double scalars[4];
      for (int i = 0; i < 4; ++i) scalars[i] = gathered_sum(shared, C + i);
      finish(a, lane < C ? gathered_sum(shared, lane) : 0.0, scalars, slope);
    }
    __syncthreads();  // slope[] is complete
    const int rows = static_cast<int>(end - begin);
    if (mine < rows) {
      generator_row_gradient(t, C, row, slope, static_cast<float>(factors.one_hot));
    }
    __syncthreads();  // rows are stored by all threads
    store_tile(a.grad_teacher, a.teacher.dtype, begin, rows, C, shared.first);
  } else {
    for (int k = threadIdx.x; k < width; k += kTileThreads) {
      a.scratch[static_cast<int64_t>(blockIdx.x) * width + k] = shared.sums[k];
    }
  }
}

__global__ void __launch_bounds__(kTileThreads, 4)
    joint_finish_tile_kernel(JointLosses a, int64_t part_rows) {
  const int C = static_cast<int>(a.C), pitch = tile_pitch(C);
  const TileShared shared(block_shared(), pitch);
  const int64_t parts = gridDim.x;
  const int lane = threadIdx.x % kWarp, width = C + kPartScalars;
  const double sum = add_parts(a.scratch, parts, width, lane < C ? lane : -1, shared.scratch);
  double scalars[4] = {};
  if (blockIdx.x == 0) {  // only there are the losses written
    const double scalar =
        add_parts(a.scratch, parts, width, lane < 4 ? C + lane : -1, shared.scratch);
    for (int i = 0; i < 4; ++i) scalars[i] = __shfl_sync(0xffffffffu, scalar, i);
  }
  float* slope = reinterpret_cast<float*>(shared.sums);
  if (threadIdx.x < kWarp) finish(a, sum, scalars, slope);
  const GeneratorFactors factors(1.0, a.terms);

  const int64_t begin = min(a.N, blockIdx.x * part_rows), end = min(a.N, begin + part_rows);
  for (int64_t at = begin; at < end; at += kTileRows) {
    const int rows = static_cast<int>(min(end - at, static_cast<int64_t>(kTileRows)));
    load_tile(a.teacher, at, rows, C, shared.first);
    __syncthreads();  // rows were loaded by all threads; also, slope[] is complete
    const int mine = threadIdx.x;
    if (mine < rows) {
      float* t = shared.first + mine * pitch;
      const GeneratorRow row = generator_row(t, C);
      generator_row_gradient(t, C, row, slope, static_cast<float>(factors.one_hot));
    }
    __syncthreads();  // rows are stored by all threads
    store_tile(a.grad_teacher, a.teacher.dtype, at, rows, C, shared.first);
    __syncthreads();  // before the next tile overwrites this one
  }
}

}  // namespace

cudaError_t launch_joint_losses(const JointLosses& args, const Plan& plan, cudaStream_t stream) {
  const dim3 blocks(plan.blocks);
  if (plan.one_launch) {
    return launch(joint_losses_tile_kernel<true>, blocks, plan.threads, plan.cluster, plan.shared,
                  stream, args, plan.rows);
  }
  const cudaError_t error = launch(joint_losses_tile_kernel<false>, blocks, plan.threads, 1,
                                   plan.shared, stream, args, plan.rows);
  if (error != cudaSuccess) return error;
  return launch(joint_finish_tile_kernel, blocks, plan.threads, 1, plan.shared, stream, args,
                plan.rows);
}

}  // namespace cuda
}  // namespace dafl
