// Up to 32 classes: the generator's loss and its gradient, and both losses of a training step with
// all their gradients for an upstream gradient of 1. generator_loss.cu and distill_loss.cu have the
// formulas.
//
// Where a GPU has clusters and N <= 1024, one cluster of eight blocks does everything in one
// launch: its blocks tell each other their sums and wait once for that, at the cluster's barrier.
// Otherwise sums are written to scratch, and a second launch starts when all of them are there.
//
// Both losses at once: teacher and student logits are read together, each row's softmaxes are
// formed once in shared memory, and losses and gradients leave from there. No row statistics are
// written. The student's and the features' gradients are a row's own affair. The teacher's needs
// p_bar, the mean over all rows. With E = N C bytes-per-logit:
//   one launch     the blocks hold all rows in shared memory until p_bar is known: 4 E bytes moved.
//   two launches   each block of the second adds the sums for itself, in the same order, and forms
//                  the rows anew from logits that the L2 cache still has: 5 E bytes.
// In the first launch the features are read, and again from the cache, and their gradient written.
#include "distill_row.cuh"
#include "tile.cuh"

namespace dafl {
namespace cuda {
namespace {

// ---- One row of the generator's loss -----------------------------------------------------------

// m, d', 1 / (1 + d') and y of a row.
struct GeneratorRow {
  float maximum, others, inverse;
  int argmax;
};

// t [C], a row that one thread owns: logits in, p out.
__device__ inline GeneratorRow generator_row(float* t, int C) {
  const Best<float> best = row_best(t, C);
  float others = 0;
  for (int k = 0; k < C; ++k) {
    const float shifted = t[k] - best.value;
    t[k] = exp_of(shifted);
    others += row_math::others_term(k == best.index, shifted, t[k]);
  }
  const float inverse = reciprocal(1.0f + others);
  for (int k = 0; k < C; ++k) t[k] *= inverse;
  return {best.value, others, inverse, best.index};
}

// p in, gradient out.
__device__ inline void generator_row_gradient(float* p, int C, const GeneratorRow& row,
                                              const float* slope, float one_hot) {
  float mean_slope = 0;
  for (int k = 0; k < C; ++k) mean_slope += p[k] * slope[k];
  for (int k = 0; k < C; ++k) {
    p[k] = row_math::generator_gradient(k == row.argmax, p[k], slope[k], mean_slope, row.others,
                                        row.inverse, one_hot);
  }
}

// A warp, a lane a class (C <= 32): slope_k of row_math.h from p_bar. Subtracting L_ie (sum p_bar
// log p_bar) from every log p_bar_k changes no gradient, since a row's p sum to 1, and spares fp32
// a cancellation.
__device__ inline float lane_slope(float mean, float factor) {
  const float log_mean = log_or_zero(mean);
  return factor * (log_mean - warp_reduce(mean * log_mean, Add()));
}

// ---- The generator's loss ----------------------------------------------------------------------

// Warp 0, a lane a class: p_bar, then the losses.
__device__ void finish(const GeneratorForward& a, double sum_of_p,
                       const double (&sums)[kGeneratorSums]) {
  const int lane = threadIdx.x;
  const double mean = sum_of_p / static_cast<double>(a.N);
  if (lane < a.C) static_cast<float*>(a.class_mean)[lane] = static_cast<float>(mean);
  const double p_log_p = warp_reduce(lane < a.C ? mean * log_or_zero(mean) : 0.0, Add());
  if (lane == 0) store_scalars<float>(generator_losses(a.terms, sums, p_log_p).values, a.losses);
}

template <bool kOneLaunch>
__global__ void __launch_bounds__(kTileThreads, 4)
    generator_forward_tile_kernel(GeneratorForward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C), pitch = tile_pitch(C);
  const TileShared shared(block_shared(), pitch);
  Group<kTileThreads, false> block(block_shared());
  if constexpr (kOneLaunch) meet_cluster();
  float* stats = static_cast<float*>(a.row_stats);
  for (int k = threadIdx.x; k < kTileWidth; k += kTileThreads) shared.sums[k] = 0;

  const int64_t begin = min(a.N, blockIdx.x * part_rows), end = min(a.N, begin + part_rows);
  double loss = 0;
  for (int64_t at = begin; at < end; at += kTileRows) {
    const int rows = static_cast<int>(min(end - at, static_cast<int64_t>(kTileRows)));
    load_tile(a.logits, at, rows, C, shared.first);
    __syncthreads();  // rows were loaded by all threads, and belong to one from here on
    const int mine = threadIdx.x;
    if (mine < rows) {
      const GeneratorRow row = generator_row(shared.first + mine * pitch, C);
      loss += log1p_of(row.others);
      stats[at + mine] = row.maximum;
      stats[a.N + at + mine] = row.others;
      stats[2 * a.N + at + mine] = static_cast<float>(row.argmax);
    }
    __syncthreads();  // columns are read across rows; also, sums[] is cleared
    add_columns(shared.first, rows, C, shared.sums);
    __syncthreads();  // before the next tile overwrites this one
  }
  loss = block.sum(loss);
  const double abs = block.sum(a.terms.F > 0 ? abs_sum(a.terms.features, a.N, a.terms.F) : 0.0);
  if (threadIdx.x == 0) {
    shared.sums[C + kOneHot] = loss;
    shared.sums[C + kAbs] = abs;
  }
  __syncthreads();  // sums[] is complete

  const int width = C + kPartScalars;
  if constexpr (kOneLaunch) {
    gather_sums(shared, width);
    if (blockIdx.x == 0 && threadIdx.x < kWarp) {
      const int lane = threadIdx.x;
      double sums[kGeneratorSums];
#pragma unroll
      for (int i = 0; i < kGeneratorSums; ++i) sums[i] = gathered_sum(shared, C + i);
      finish(a, lane < C ? gathered_sum(shared, lane) : 0.0, sums);
    }
  } else {
    for (int k = threadIdx.x; k < width; k += kTileThreads) {
      a.scratch[static_cast<int64_t>(blockIdx.x) * width + k] = shared.sums[k];
    }
  }
}

__global__ void __launch_bounds__(kTileThreads, 4)
    generator_backward_tile_kernel(GeneratorBackward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C), pitch = tile_pitch(C);
  const TileShared shared(block_shared(), pitch);
  const GeneratorFactors factors =
      generator_factors(a.terms, upstream_of(a.upstream, a.upstream_dtype));
  float* slope = reinterpret_cast<float*>(shared.sums);
  if (threadIdx.x < kWarp) {
    const float* mean = static_cast<const float*>(a.class_mean);
    const int k = threadIdx.x;
    slope[k] = lane_slope(k < C ? mean[k] : 0.0f, static_cast<float>(factors.slope));
  }
  const float* stats = static_cast<const float*>(a.row_stats);
  const float one_hot = static_cast<float>(factors.one_hot);

  const int64_t begin = min(a.N, blockIdx.x * part_rows), end = min(a.N, begin + part_rows);
  for (int64_t at = begin; at < end; at += kTileRows) {
    const int rows = static_cast<int>(min(end - at, static_cast<int64_t>(kTileRows)));
    load_tile(a.logits, at, rows, C, shared.first);
    __syncthreads();  // rows were loaded by all threads; also, slope[] is complete
    const int mine = threadIdx.x;
    if (mine < rows) {
      float* p = shared.first + mine * pitch;
      const float others = stats[a.N + at + mine];
      const GeneratorRow row{stats[at + mine], others, reciprocal(1.0f + others),
                             static_cast<int>(stats[2 * a.N + at + mine])};
      for (int k = 0; k < C; ++k) p[k] = exp_of(p[k] - row.maximum) * row.inverse;
      generator_row_gradient(p, C, row, slope, one_hot);
    }
    __syncthreads();  // rows are stored by all threads
    store_tile(a.grad_logits, a.logits.dtype, at, rows, C, shared.first);
    __syncthreads();  // before the next tile overwrites this one
  }
  if (a.terms.F > 0) {
    sign_gradient(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features);
  }
}

// ---- Both losses at once -----------------------------------------------------------------------

// Scalars of a part, behind the generator's.
enum { kKl = kGeneratorSums, kAgreeing };

// One warp, a lane a class: p_bar's slope, and from block 0 the losses.
__device__ void finish(const JointLosses& a, double sum_of_p, const double (&scalars)[kPartScalars],
                       float* slope) {
  const int lane = threadIdx.x;
  const GeneratorFactors factors = generator_factors(a.terms, 1.0);
  const double mean = lane < a.C ? sum_of_p / static_cast<double>(a.N) : 0.0;
  slope[lane] = lane_slope(static_cast<float>(mean), static_cast<float>(factors.slope));
  if (blockIdx.x != 0) return;  // the whole warp
  const double p_log_p = warp_reduce(mean * log_or_zero(mean), Add());
  if (lane == 0) {
    store_scalars<float>(generator_losses(a.terms, scalars, p_log_p).values, a.losses);
    write_distill_losses<float>(a.N, a.distill_scale, scalars[kKl], scalars[kAgreeing],
                                a.losses + kGeneratorLosses);
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
  const GeneratorFactors factors = generator_factors(a.terms, 1.0);

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
      double scalars[kPartScalars];
      for (int i = 0; i < kPartScalars; ++i) scalars[i] = gathered_sum(shared, C + i);
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
  double scalars[kPartScalars] = {};
  if (blockIdx.x == 0) {  // only there are the losses written
    const double scalar =
        add_parts(a.scratch, parts, width, lane < kPartScalars ? C + lane : -1, shared.scratch);
    for (int i = 0; i < kPartScalars; ++i) scalars[i] = __shfl_sync(0xffffffffu, scalar, i);
  }
  float* slope = reinterpret_cast<float*>(shared.sums);
  if (threadIdx.x < kWarp) finish(a, sum, scalars, slope);
  const GeneratorFactors factors = generator_factors(a.terms, 1.0);

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

cudaError_t launch_generator_forward_tile(const GeneratorForward& args, const Plan& plan,
                                          cudaStream_t stream) {
  const auto kernel =
      plan.one_launch ? generator_forward_tile_kernel<true> : generator_forward_tile_kernel<false>;
  return launch(kernel, dim3(plan.blocks), plan.threads, plan.cluster, plan.shared, stream, args,
                plan.rows);
}

cudaError_t launch_generator_backward_tile(const GeneratorBackward& args, const Plan& plan,
                                           cudaStream_t stream) {
  return launch(generator_backward_tile_kernel, dim3(plan.blocks), plan.threads, 1, plan.shared,
                stream, args, plan.rows);
}

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
