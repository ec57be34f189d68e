// Up to 32 classes: the generator's loss and its gradient, and both losses of a training step with
// all their gradients for an upstream gradient of 1. generator_loss.cu and distill_loss.cu have the
// formulas.
//
// Where a GPU has clusters and N <= 1024, one cluster of eight blocks does everything in one
// launch: its blocks tell each other their sums and wait once for that, at the cluster's barrier.
// Otherwise sums are written to scratch, and a second launch starts when all of them are there.
//
// Both losses at once: teacher and student logits are read together, each row's softmaxes are
// formed once, and losses and gradients leave from its thread's registers. No row statistics are
// written. The student's and the features' gradients are a row's own affair. The teacher's needs
// p_bar, the mean over all rows. With E = N C bytes-per-logit:
//   one launch     threads hold their rows until p_bar is known: 4 E bytes moved.
//   two launches   each block of the second adds the sums for itself, in the same order, and forms
//                  the rows anew from logits that the L2 cache still has: 5 E bytes.
// In the first launch the features are read and their gradient written.
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

// Logits in, p out; behind the C-th 0. A NaN or an infinity makes d' NaN.
template <int kC>
__device__ GeneratorRow generator_row(float (&t)[kC]) {
  GeneratorRow row;
  row.maximum = row_best(t, &row.argmax);
  row.others = row.argmax < 0 ? NAN : row.maximum - row.maximum;
#pragma unroll
  for (int k = 0; k < kC; ++k) {
    t[k] = exp_below(t[k], row.maximum);
    row.others += k == row.argmax ? 0.0f : t[k];
  }
  row.argmax = max(row.argmax, 0);
  row.inverse = reciprocal(1.0f + row.others);
#pragma unroll
  for (int k = 0; k < kC; ++k) t[k] *= row.inverse;
  return row;
}

// p in, gradient out. slope: of all classes.
template <int kC>
__device__ void generator_row_gradient(float (&p)[kC], const GeneratorRow& row, const float* slope,
                                       float one_hot) {
  const float slope_y = slope[row.argmax];
  float gap = 0;
#pragma unroll
  for (int k = 0; k < kC; ++k) gap += p[k] * (slope[k] - slope_y);
#pragma unroll
  for (int k = 0; k < kC; ++k) {
    p[k] = k == row.argmax ? row_math::argmax_gradient(row.others, row.inverse, gap, one_hot)
                           : p[k] * ((slope[k] - slope_y) + (one_hot - gap));
  }
}

// A warp, a lane a class (C <= 32): slope_k of row_math.h from p_bar. Subtracting L_ie (sum p_bar
// log p_bar) from every log p_bar_k changes no gradient, since a row's p sum to 1, and spares fp32
// a cancellation.
__device__ inline float lane_slope(float mean, float factor) {
  const float log_mean = log_or_zero(mean);
  return factor * (log_mean - lane_sum(mean * log_mean));
}

// A warp, a lane a class: the losses, and p_bar where it is wanted.
template <class Args>
__device__ void write_generator_losses(const Args& a, double sum_of_p, const double* sums,
                                       float* class_mean) {
  const int lane = threadIdx.x % kWarp;
  const double mean = lane < a.C ? sum_of_p / static_cast<double>(a.N) : 0.0;
  if (class_mean != nullptr && lane < a.C) class_mean[lane] = static_cast<float>(mean);
  const Entropy entropy = Entropy::of(mean, log_of_mean(mean)).lane_sums();
  if (lane == 0) {
    store_scalars<float>(generator_losses(a.terms, sums, entropy.total()).values, a.losses);
  }
}

// ---- The generator's loss ----------------------------------------------------------------------

template <bool kOneLaunch, int kC>
__global__ void __launch_bounds__(TileRoles<kOneLaunch, kC>::kThreads, 1)
    generator_forward_tile_kernel(GeneratorForward a, int64_t part_rows) {
  using Roles = TileRoles<kOneLaunch, kC>;
  const int C = static_cast<int>(a.C);
  const TileShared shared(block_shared());
  if constexpr (kOneLaunch) shared.begin_meeting();
  float* stats = static_cast<float*>(a.row_stats);
  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  double sums[kGeneratorSums] = {};
  float columns[kC] = {};
  GeneratorRow one{};
  const auto write_stats = [&](int64_t row) {
    stats[row] = one.maximum;
    stats[a.N + row] = one.others;
    stats[2 * a.N + row] = static_cast<float>(one.argmax);
  };
  if (Roles::has_rows()) {
    for (int64_t row = begin + threadIdx.x; row < end; row += Roles::kRowThreads) {
      float t[kC];
      load_tile_row(a.logits, row, C, t);
      one = generator_row(t);
#pragma unroll
      for (int k = 0; k < kC; ++k) columns[k] += t[k];
      sums[kOneHot] += static_cast<double>(log1p_of(one.others));
      if (!kOneLaunch) write_stats(row);  // in one launch a thread has one row, and time later
    }
  }
  if (a.terms.F > 0 && Roles::has_features()) {
    sums[kAbs] = activation(a.terms.features, a.N, a.terms.F, 0, nullptr, Roles::feature_thread(),
                            Roles::kFeatureThreads);
  }
  shared.put<kC>(warp_columns(columns), C, sums);
  __syncthreads();  // all warps' sums are there

  const int width = C + kGeneratorSums;
  if constexpr (kOneLaunch) {
    shared.end_meeting();
    shared.send(width);
    const int64_t row = begin + threadIdx.x;
    if (Roles::has_rows() && row < end) write_stats(row);
    shared.receive();
    if (blockIdx.x == 0 && threadIdx.x < kWarp) {
      const int lane = threadIdx.x;
      double scalars[kGeneratorSums];
#pragma unroll
      for (int i = 0; i < kGeneratorSums; ++i) scalars[i] = shared.gathered_sum(C + i);
      write_generator_losses(a, lane < C ? shared.gathered_sum(lane) : 0.0, scalars,
                             static_cast<float*>(a.class_mean));
    }
  } else {
    const Parts<float> parts(a.scratch, C);
    const int k = threadIdx.x;
    if (k < C) parts.columns(blockIdx.x)[k] = static_cast<float>(shared.block_sum(k));
    if (k >= C && k < width) parts.scalars(blockIdx.x)[k - C] = shared.block_sum(k);
  }
}

template <int kC>
__global__ void __launch_bounds__(kTileThreads)
    generator_backward_tile_kernel(GeneratorBackward a) {
  const int C = static_cast<int>(a.C);
  const TileShared shared(block_shared());
  const GeneratorFactors factors =
      generator_factors(a.terms, upstream_of(a.upstream, a.upstream_dtype));
  if (threadIdx.x < kWarp) {
    const float* mean = static_cast<const float*>(a.class_mean);
    const int k = threadIdx.x;
    shared.slope[k] = lane_slope(k < C ? mean[k] : 0.0f, static_cast<float>(factors.slope));
  }
  const float* stats = static_cast<const float*>(a.row_stats);
  const float one_hot = static_cast<float>(factors.one_hot);
  if (a.terms.F > 0) {
    activation(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features, threadIdx.x,
               kTileThreads);
  }
  __syncthreads();  // slope[] is complete
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTileThreads;
  for (int64_t row = spread_row(); row < a.N; row += step) {
    float p[kC];
    load_tile_row(a.logits, row, C, p);
    const float others = stats[a.N + row];
    const GeneratorRow one{stats[row], others, reciprocal(1.0f + others),
                           class_of(stats[2 * a.N + row], C)};
#pragma unroll
    for (int k = 0; k < kC; ++k) p[k] = exp_below(p[k], one.maximum) * one.inverse;
    generator_row_gradient(p, one, shared.slope, one_hot);
    store_tile_row(a.grad_logits, a.logits.dtype, row, C, p);
  }
}

// ---- Both losses at once -----------------------------------------------------------------------

// Scalars of a part, behind the generator's.
enum { kKl = kGeneratorSums, kAgreeing };

// Two warps of a block, a lane a class, each from all sums: one forms p_bar's slopes, for which
// gradients wait, and in block 0 another the losses, for which nobody does.
template <class Sum>
__device__ void finish(const JointLosses& a, const TileShared& shared, Sum sum) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int C = static_cast<int>(a.C);
  if (warp == 0) {
    const GeneratorFactors factors = generator_factors(a.terms, 1.0);
    const double mean = lane < C ? sum.column(lane) / static_cast<double>(a.N) : 0.0;
    shared.slope[lane] = lane_slope(static_cast<float>(mean), static_cast<float>(factors.slope));
  } else if (warp == 1 && blockIdx.x == 0) {
    double scalars[kPartScalars];
#pragma unroll
    for (int i = 0; i < kPartScalars; ++i) scalars[i] = sum.scalar(i);
    write_generator_losses(a, lane < C ? sum.column(lane) : 0.0, scalars, nullptr);
    if (lane == 0) {
      write_distill_losses<float>(a.N, a.distill_scale, scalars[kKl], scalars[kAgreeing],
                                  a.losses + kGeneratorLosses);
    }
  }
}

// All blocks' sums: of p, lane's own, and of scalars.
struct GatheredSums {
  const TileShared& shared;
  int C;

  __device__ double column(int k) const { return shared.gathered_sum(k); }
  __device__ double scalar(int i) const { return shared.gathered_sum(C + i); }
};

struct AddedSums {
  double own;
  const double (&scalars)[kPartScalars];

  __device__ double column(int) const { return own; }
  __device__ double scalar(int i) const { return scalars[i]; }
};

template <bool kOneLaunch, int kC>
__global__ void __launch_bounds__(TileRoles<kOneLaunch, kC>::kThreads, 1)
    joint_losses_tile_kernel(JointLosses a, int64_t part_rows) {
  using Roles = TileRoles<kOneLaunch, kC>;
  const int C = static_cast<int>(a.C);
  const TileShared shared(block_shared());
  if constexpr (kOneLaunch) shared.begin_meeting();
  const float scale = static_cast<float>(a.inverse_temperature);
  const float factor = static_cast<float>(a.distill_grad_scale * a.terms.per_row);
  const GeneratorFactors factors = generator_factors(a.terms, 1.0);

  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  double sums[kPartScalars] = {};
  float s[kC], t[kC], p[kC], columns[kC] = {};
  GeneratorRow one{};
  DistillRow pair(0, 0, 0, 0, 0);
  // In one launch nothing waits for the student's gradient, if the registers hold its row so long.
  constexpr bool kLater = kOneLaunch && kC <= 16;
  const auto write_student = [&](int64_t row) {
    distill_row_gradient(s, t, C, pair, factor);
    store_tile_row(a.grad_student, a.student.dtype, row, C, s);
  };
  if (Roles::has_rows()) {
    for (int64_t row = begin + threadIdx.x; row < end; row += Roles::kRowThreads) {
      float log_s, log_t;
      bool agree;
      load_tile_row(a.teacher, row, C, t);
      load_tile_row(a.student, row, C, s);
      pair = distill_row(s, t, scale, &agree, &log_s, &log_t);
      sums[kKl] += static_cast<double>(distill_row_kl(s, t, C, pair));
      sums[kAgreeing] += agree ? 1 : 0;
      if (!kLater) write_student(row);
#pragma unroll
      for (int k = 0; k < kC; ++k) p[k] = t[k];
      one = generator_row(p);
#pragma unroll
      for (int k = 0; k < kC; ++k) columns[k] += p[k];
      sums[kOneHot] += static_cast<double>(log1p_of(one.others));
    }
  }
  if (a.terms.F > 0 && Roles::has_features()) {
    sums[kAbs] = activation(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features,
                            Roles::feature_thread(), Roles::kFeatureThreads);
  }
  shared.put<kC>(warp_columns(columns), C, sums);
  __syncthreads();  // all warps' sums are there

  const int width = C + kPartScalars;
  if constexpr (kOneLaunch) {
    const int64_t row = begin + threadIdx.x;
    const bool has_row = Roles::has_rows() && row < end;
    shared.end_meeting();
    shared.send(width);
    if (kLater && has_row) write_student(row);
    shared.receive();
    finish(a, shared, GatheredSums{shared, C});
    __syncthreads();  // slope[] is complete
    if (has_row) {
      generator_row_gradient(p, one, shared.slope, static_cast<float>(factors.one_hot));
      store_tile_row(a.grad_teacher, a.teacher.dtype, row, C, p);
    }
  } else {
    const Parts<float> parts(a.scratch, C);
    const int k = threadIdx.x;
    if (k < C) parts.columns(blockIdx.x)[k] = static_cast<float>(shared.block_sum(k));
    if (k >= C && k < width) parts.scalars(blockIdx.x)[k - C] = shared.block_sum(k);
  }
}

template <int kC>
__global__ void __launch_bounds__(kTileThreads)
    joint_finish_tile_kernel(JointLosses a, int64_t parts) {
  const int C = static_cast<int>(a.C);
  const TileShared shared(block_shared());
  const Parts<float> all(a.scratch, C);
  const int lane = threadIdx.x % kWarp;
  // Every block adds the parts for itself, in the same order; the losses only one of them.
  const double column = add_columns(parts, shared.warps, [&](int64_t p) {
    return lane < C ? static_cast<double>(all.columns(p)[lane]) : 0.0;
  });
  double scalars[kPartScalars] = {};
  if (blockIdx.x == 0) {
    Block<kAddThreads> block(block_shared() + kTileBytes);
    add_scalars(parts, block, scalars, [&](int64_t p, int k) { return all.scalars(p)[k]; });
  }
  finish(a, shared, AddedSums{column, scalars});
  __syncthreads();  // slope[] is complete
  const GeneratorFactors factors = generator_factors(a.terms, 1.0);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTileThreads;
  for (int64_t row = spread_row(); row < a.N; row += step) {
    float t[kC];
    load_tile_row(a.teacher, row, C, t);
    const GeneratorRow one = generator_row(t);
    generator_row_gradient(t, one, shared.slope, static_cast<float>(factors.one_hot));
    store_tile_row(a.grad_teacher, a.teacher.dtype, row, C, t);
  }
}

}  // namespace

cudaError_t launch_generator_forward_tile(const GeneratorForward& args, const Plan& plan,
                                          cudaStream_t stream) {
  return with_columns(args.C, [&](auto columns) {
    const auto kernel = plan.one_launch ? generator_forward_tile_kernel<true, columns()>
                                        : generator_forward_tile_kernel<false, columns()>;
    return launch(kernel, dim3(plan.blocks), plan.threads, plan.cluster, plan.shared, stream, args,
                  plan.rows);
  });
}

cudaError_t launch_generator_backward_tile(const GeneratorBackward& args, const Plan& plan,
                                           cudaStream_t stream) {
  return with_columns(args.C, [&](auto columns) {
    return launch(generator_backward_tile_kernel<columns()>, dim3(plan.backward_blocks),
                  kTileThreads, 1, plan.shared, stream, args);
  });
}

cudaError_t launch_joint_losses(const JointLosses& args, const Plan& plan, cudaStream_t stream) {
  const dim3 blocks(plan.blocks);
  return with_columns(args.C, [&](auto columns) {
    if (plan.one_launch) {
      return launch(joint_losses_tile_kernel<true, columns()>, blocks, plan.threads, plan.cluster,
                    plan.shared, stream, args, plan.rows);
    }
    const cudaError_t error = launch(joint_losses_tile_kernel<false, columns()>, blocks,
                                     plan.threads, 1, plan.shared, stream, args, plan.rows);
    if (error != cudaSuccess) return error;
    return launch(joint_finish_tile_kernel<columns()>, dim3(plan.backward_blocks), kTileThreads, 1,
                  plan.shared, stream, args, plan.parts);
  });
}

}  // namespace cuda
}  // namespace dafl
