// The generator's loss and its gradient, for logits t [N, C] and features f [N, F]:
//
//   m = max_k t_k   y = argmax_k t_k   d' = sum_{k != y} exp(t_k - m)
//   p_k = exp(t_k - m) / (1 + d')      p_bar = mean p
//   total = w_oh mean log(1 + d') + w_ie sum_c p_bar_c log_b p_bar_c - w_a mean |f|
//
//   d total / d t_k = w_oh / N (p_k - [k = y]) + p_k (g_k - sum_c p_c g_c)
//   g_k = w_ie / (N ln b) (log p_bar_k - const)          d total / d f = -w_a sign(f) / (N F)
//
// Fused: softmax, argmax, cross-entropy, batch mean, entropy and activation loss, and their
// gradients. Never materialised: probabilities, their logarithms, |f|, one-hot targets.
//
// Every row's gradient needs p_bar, the mean over all rows. So the forward pass reads t once, and
// leaves m, d', y of every row and p_bar; the backward pass reads t again and writes the gradient.
// With E = N C bytes-per-logit that is 3 E + 24 N bytes for both, and f twice and its gradient
// once.
//
// Sums over rows are formed per part (see plan.h), in fp32 over at most 512 rows and in fp64 from
// there on, written to scratch, and added in order by a second launch: the end of a launch is the
// barrier that all parts wait for. The backward pass is one launch. Where C <= 32 the kernels of
// tile_losses.cu do this.
#include "tile.cuh"

namespace dafl {
namespace cuda {
namespace {

// Parts in scratch: [parts][C + kPartScalars]; of the scalars, the loss uses kGeneratorSums.

// ---- Rows in registers -------------------------------------------------------------------------

template <class R>
__global__ void __launch_bounds__(R::kThreads, R::kBlocks)
    generator_forward_rows_kernel(GeneratorForward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C);
  Group<R::kGroup, R::kCluster> group(block_shared());
  const PartOfRows<R> rows(a.N, C, part_rows);
  const bool quads = has_quads(a.logits, C);
  float* stats = static_cast<float*>(a.row_stats);
  float sum_of_p[R::kValues];
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) sum_of_p[i] = 0;
  double loss = 0;

  for (int64_t row = rows.first; row < rows.end; row += R::kGroups) {
    float x[R::kValues];
    load_row<R::kGroup, R::kQuads>(a.logits, quads, row, rows.own, x);
    if (row + R::kGroups < rows.end) {
      prefetch_row<R::kGroup, R::kQuads>(a.logits, quads, row + R::kGroups, rows.own);
    }
    Best<float> best{lowest(0.0f), column_of<R::kGroup>(0, rows.own.first)};
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      if (x[i] > best.value) best = {x[i], column_of<R::kGroup>(i, rows.own.first)};
    }
    best = group.reduce(best, Better());
    float others = 0;
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      const float shifted = x[i] - best.value;
      x[i] = exp_of(shifted);
      const int column = column_of<R::kGroup>(i, rows.own.first);
      // In a cluster, what is padding behind one block's columns is a column of the next.
      const bool is_argmax = column == best.index && (!R::kCluster || column < rows.own.limit);
      others += row_math::others_term(is_argmax, shifted, x[i]);
    }
    others = group.sum(others);
    const float inverse = reciprocal(1.0f + others);
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) sum_of_p[i] += x[i] * inverse;
    if (group.thread == 0) {
      loss += log1p_of(others);
      stats[row] = best.value;
      stats[a.N + row] = others;
      stats[2 * a.N + row] = static_cast<float>(best.index);
    }
  }

  double* part = a.scratch + rows.part * (a.C + kPartScalars);
  if constexpr (R::kGroups > 1) {
    // The block's warps have the same columns: they meet in shared memory, in the warps' order.
    float* meeting = reinterpret_cast<float*>(block_shared() + kReduceBytes);
    constexpr int kWidth = R::kGroup * R::kValues;
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      meeting[threadIdx.x / R::kGroup * kWidth + column_of<R::kGroup>(i, rows.own.first)] =
          sum_of_p[i];
    }
    __syncthreads();  // all warps' sums are there
    for (int k = threadIdx.x; k < C; k += R::kThreads) {
      double sum = 0;
#pragma unroll
      for (int w = 0; w < R::kGroups; ++w) sum += static_cast<double>(meeting[w * kWidth + k]);
      part[k] = sum;
    }
  } else {
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      const int column = column_of<R::kGroup>(i, rows.own.first);
      if (column < rows.own.limit) part[column] = static_cast<double>(sum_of_p[i]);
    }
  }
  // Over the whole block or cluster, whatever a group is. No reduction of `group` is under way in
  // these slots: a warp's has none in memory, and otherwise this is the same kind of group, whose
  // turn may start afresh behind the barrier.
  __syncthreads();
  Group<R::kThreads, R::kCluster> all(block_shared());
  loss = all.sum(loss);
  const double abs = all.sum(a.terms.F > 0 ? abs_sum(a.terms.features, a.N, a.terms.F) : 0.0);
  if (all.thread == 0) {
    part[a.C + kOneHot] = loss;
    part[a.C + kAbs] = abs;
  }
}

// One block fewer than in the forward pass where that leaves two or more: the slope of a thread's
// columns stays in registers beside the row, and for sm_120 what kBlocks blocks have spills.
template <class R>
__global__ void __launch_bounds__(R::kThreads, R::kBlocks > 2 ? R::kBlocks - 1 : R::kBlocks)
    generator_backward_rows_kernel(GeneratorBackward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C);
  Group<R::kGroup, R::kCluster> group(block_shared());
  const PartOfRows<R> rows(a.N, C, part_rows);
  const GeneratorFactors factors =
      generator_factors(a.terms, upstream_of(a.upstream, a.upstream_dtype));
  const bool quads = has_quads(a.logits, C);
  const float* stats = static_cast<const float*>(a.row_stats);
  const float one_hot = static_cast<float>(factors.one_hot);

  // A thread's own columns of the slope, once for all its rows (see lane_slope).
  float slope[R::kValues], centre = 0;
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) {
    const int column = column_of<R::kGroup>(i, rows.own.first);
    const float mean =
        column < rows.own.limit ? static_cast<const float*>(a.class_mean)[column] : 0.0f;
    slope[i] = log_or_zero(mean);
    centre += mean * slope[i];
  }
  centre = group.sum(centre);
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) {
    slope[i] = static_cast<float>(factors.slope) * (slope[i] - centre);
  }

  for (int64_t row = rows.first; row < rows.end; row += R::kGroups) {
    float x[R::kValues];
    load_row<R::kGroup, R::kQuads>(a.logits, quads, row, rows.own, x);
    if (row + R::kGroups < rows.end) {
      prefetch_row<R::kGroup, R::kQuads>(a.logits, quads, row + R::kGroups, rows.own);
    }
    const float maximum = stats[row], others = stats[a.N + row];
    const int argmax = static_cast<int>(stats[2 * a.N + row]);
    const float inverse = reciprocal(1.0f + others);
    float mean_slope = 0;
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      x[i] = exp_of(x[i] - maximum) * inverse;
      mean_slope += x[i] * slope[i];
    }
    mean_slope = group.sum(mean_slope);
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      const bool is_argmax = column_of<R::kGroup>(i, rows.own.first) == argmax;
      x[i] = row_math::generator_gradient(is_argmax, x[i], slope[i], mean_slope, others, inverse,
                                          one_hot);
    }
    store_row<R::kGroup, R::kQuads>(a.grad_logits, a.logits.dtype, row, C, rows.own, x);
  }
  if (a.terms.F > 0) {
    sign_gradient(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features);
  }
}

// ---- Any size, and fp64 ------------------------------------------------------------------------

// Row statistics, a block a row, part by part.
template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    generator_stats_stream_kernel(GeneratorForward a, int64_t part_rows) {
  Group<kStreamThreads, false> block(block_shared());
  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  S* stats = static_cast<S*>(a.row_stats);
  double loss = 0;
  for (int64_t row = begin; row < end; ++row) {
    Best<S> best{lowest(S(0)), static_cast<int>(threadIdx.x)};
    for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads) {
      const S x = load<S>(a.logits, row, k);
      if (x > best.value) best = {x, static_cast<int>(k)};
    }
    best = block.reduce(best, Better());
    S others = 0;
    for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads) {
      const S shifted = load<S>(a.logits, row, k) - best.value;
      others += row_math::others_term(k == best.index, shifted, exp_of(shifted));
    }
    others = block.sum(others);
    if (threadIdx.x == 0) {
      loss += static_cast<double>(log1p_of(others));
      stats[row] = best.value;
      stats[a.N + row] = others;
      stats[2 * a.N + row] = static_cast<S>(best.index);
    }
  }
  const double abs = block.sum(a.terms.F > 0 ? abs_sum(a.terms.features, a.N, a.terms.F) : 0.0);
  if (threadIdx.x == 0) {
    double* scalars = a.scratch + blockIdx.x * (a.C + kPartScalars) + a.C;
    scalars[kOneHot] = loss;
    scalars[kAbs] = abs;
  }
}

// A part's sums of p from those statistics: a thread a column, which it follows down the rows.
template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    generator_columns_stream_kernel(GeneratorForward a, int64_t part_rows) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kStreamThreads + threadIdx.x;
  const int64_t begin = blockIdx.y * part_rows, end = min(a.N, begin + part_rows);
  const S* stats = static_cast<const S*>(a.row_stats);
  if (k >= a.C) return;  // no barrier follows
  double sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    const S e = exp_of(load<S>(a.logits, row, k) - stats[row]);
    sum += static_cast<double>(e / (S(1) + stats[a.N + row]));
  }
  a.scratch[blockIdx.y * (a.C + kPartScalars) + k] = sum;
}

template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    generator_backward_stream_kernel(GeneratorBackward a, int64_t part_rows) {
  Group<kStreamThreads, false> block(block_shared());
  const GeneratorFactors factors =
      generator_factors(a.terms, upstream_of(a.upstream, a.upstream_dtype));
  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  const S* stats = static_cast<const S*>(a.row_stats);
  const S* mean = static_cast<const S*>(a.class_mean);
  const S one_hot = static_cast<S>(factors.one_hot), factor = static_cast<S>(factors.slope);
  S centre = 0;
  for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads)
    centre += mean[k] * log_or_zero(mean[k]);
  centre = block.sum(centre);

  for (int64_t row = begin; row < end; ++row) {
    const S maximum = stats[row], others = stats[a.N + row];
    const int64_t argmax = static_cast<int64_t>(stats[2 * a.N + row]);
    const S inverse = S(1) / (S(1) + others);
    S mean_slope = 0;
    for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads) {
      const S p = exp_of(load<S>(a.logits, row, k) - maximum) * inverse;
      mean_slope += p * (factor * (log_or_zero(mean[k]) - centre));
    }
    mean_slope = block.sum(mean_slope);
    for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads) {
      const S p = exp_of(load<S>(a.logits, row, k) - maximum) * inverse;
      const S slope = factor * (log_or_zero(mean[k]) - centre);
      store(a.grad_logits, a.logits.dtype, row * a.C + k,
            row_math::generator_gradient(k == argmax, p, slope, mean_slope, others, inverse,
                                         one_hot));
    }
  }
  if (a.terms.F > 0) {
    sign_gradient(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features);
  }
}

// ---- Adding the parts --------------------------------------------------------------------------

// By a whole block; p_log_p: the sum of p_bar log p_bar, in nats.
template <class S>
__device__ void write_losses(const GeneratorForward& a, int64_t parts, double p_log_p,
                             double* shared) {
  const int lane = threadIdx.x % kWarp;
  const double scalar = add_parts(a.scratch, parts, a.C + kPartScalars,
                                  lane < kGeneratorSums ? a.C + lane : -1, shared);
  double sums[kGeneratorSums];
#pragma unroll
  for (int i = 0; i < kGeneratorSums; ++i) sums[i] = __shfl_sync(0xffffffffu, scalar, i);
  if (threadIdx.x == 0) store_scalars<S>(generator_losses(a.terms, sums, p_log_p).values, a.losses);
}

// p_bar from the parts, 32 classes a block, and the block's share of sum p_bar log p_bar. A single
// block goes on to the losses; otherwise generator_totals_kernel follows.
template <class S>
__global__ void __launch_bounds__(8 * kColumnsPerBlock)
    generator_class_mean_kernel(GeneratorForward a, int64_t parts) {
  double* shared = reinterpret_cast<double*>(block_shared());
  const int64_t width = a.C + kPartScalars;
  const int lane = threadIdx.x % kWarp;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kColumnsPerBlock + lane;
  const double mean =
      add_parts(a.scratch, parts, width, k < a.C ? k : -1, shared) / static_cast<double>(a.N);
  const double p_log_p = warp_reduce(k < a.C ? mean * log_or_zero(mean) : 0.0, Add());
  if (threadIdx.x < kWarp && k < a.C) static_cast<S*>(a.class_mean)[k] = static_cast<S>(mean);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) a.scratch[parts * width + blockIdx.x] = p_log_p;
    return;  // the whole block
  }
  write_losses<S>(a, parts, p_log_p, shared);
}

template <class S>
__global__ void __launch_bounds__(8 * kColumnsPerBlock)
    generator_totals_kernel(GeneratorForward a, int64_t parts) {
  double* shared = reinterpret_cast<double*>(block_shared());
  const int64_t width = a.C + kPartScalars;
  const int64_t shares = (a.C + kColumnsPerBlock - 1) / kColumnsPerBlock;
  const int lane = threadIdx.x % kWarp;
  // The shares of sum p_bar log p_bar as 32 columns of one "part" each.
  double p_log_p = 0;
  for (int64_t i = lane; i < shares; i += kWarp) p_log_p += a.scratch[parts * width + i];
  p_log_p = warp_reduce(p_log_p, Add());
  write_losses<S>(a, parts, p_log_p, shared);
}

template <class S>
cudaError_t launch_add_parts(const GeneratorForward& args, const Plan& plan, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.C, kColumnsPerBlock);
  const int threads = 8 * kColumnsPerBlock;
  cudaError_t error = launch(generator_class_mean_kernel<S>, dim3(blocks), threads, 1,
                             kAddPartsBytes, stream, args, plan.parts);
  if (error == cudaSuccess && blocks > 1) {
    error = launch(generator_totals_kernel<S>, dim3(1), threads, 1, kAddPartsBytes, stream, args,
                   plan.parts);
  }
  return error;
}

template <class S>
cudaError_t launch_forward_stream(const GeneratorForward& args, const Plan& plan,
                                  cudaStream_t stream) {
  cudaError_t error = launch(generator_stats_stream_kernel<S>, dim3(plan.blocks), plan.threads, 1,
                             plan.shared, stream, args, plan.rows);
  if (error == cudaSuccess) {
    const dim3 grid(ceil_div(args.C, kStreamThreads), plan.parts);
    error = launch(generator_columns_stream_kernel<S>, grid, kStreamThreads, 1, 0, stream, args,
                   plan.rows);
  }
  return error;
}

}  // namespace

cudaError_t launch_generator_forward(const GeneratorForward& args, const Plan& plan,
                                     cudaStream_t stream) {
  cudaError_t error;
  if (plan.regime == Regime::stream) {
    error = args.f64 ? launch_forward_stream<double>(args, plan, stream)
                     : launch_forward_stream<float>(args, plan, stream);
  } else if (plan.regime == Regime::tile) {
    error = launch_generator_forward_tile(args, plan, stream);
  } else {
    error = with_rows(plan, [&](auto rows) {
      return launch(generator_forward_rows_kernel<decltype(rows)>, dim3(plan.blocks), plan.threads,
                    plan.cluster, plan.shared, stream, args, plan.rows);
    });
  }
  if (error != cudaSuccess || plan.one_launch) return error;
  return args.f64 ? launch_add_parts<double>(args, plan, stream)
                  : launch_add_parts<float>(args, plan, stream);
}

cudaError_t launch_generator_backward(const GeneratorBackward& args, const Plan& plan,
                                      cudaStream_t stream) {
  const dim3 blocks(plan.blocks);
  if (plan.regime == Regime::stream) {
    const auto kernel = args.f64 ? generator_backward_stream_kernel<double>
                                 : generator_backward_stream_kernel<float>;
    return launch(kernel, blocks, plan.threads, 1, plan.shared, stream, args, plan.rows);
  }
  if (plan.regime == Regime::tile) return launch_generator_backward_tile(args, plan, stream);
  return with_rows(plan, [&](auto rows) {
    return launch(generator_backward_rows_kernel<decltype(rows)>, blocks, plan.threads,
                  plan.cluster, plan.shared, stream, args, plan.rows);
  });
}

}  // namespace cuda
}  // namespace dafl
