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
#include "generator_stream.cuh"
#include "rows.cuh"
#include "tile.cuh"

namespace dafl {
namespace cuda {
namespace {

// ---- Rows in registers -------------------------------------------------------------------------

// A softmax of a row that a group of threads shares, from what its warps tell each other.
struct RowSums {
  float maximum = -FLT_MAX;
  float others = 0;     // d'
  int ties = 0;         // columns that reach the maximum
  int index = INT_MAX;  // the lowest of them
};

// Logits in x become exp(t - their warp's maximum). Each warp forms its sums from its own maximum,
// so that the group needs to wait for one another only once. Returned: the row's sums, and in
// `scale` what makes p of this thread's x. A NaN or an infinity makes d' NaN.
template <class R, class T>
__device__ RowSums row_softmax(Group<R>& group, const Columns<R, T>& own, float (&x)[R::kValues],
                               float* scale) {
  float best[own.kVectors], sums[4] = {};
  const float mine = own.maximum(x, best);
  RowSums warp;
  warp.maximum = lane_max<R::kLanes>(mine);
  if (mine == warp.maximum) {
    warp.index = own.lowest(x, best, mine, &warp.ties);
    sums[0] = mine - mine;  // NaN for an infinity, else 0
  }
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) {
    const float e = exp_below(x[i], warp.maximum);
    if (x[i] != warp.maximum) sums[i % 4] += e;  // a NaN, too
    x[i] = e;
  }
  warp.others = lane_sum<R::kLanes>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  warp.ties = lane_count<R::kLanes>(warp.ties);
  warp.index = lane_min<R::kLanes>(warp.index);

  RowSums row = warp;
  if constexpr (R::kWarps > 1) {
    RowSums heard[Group<R>::kHeard];
    group.tell(warp, RowSums(), heard);
    row = RowSums();
#pragma unroll
    for (const RowSums& one : heard) row.maximum = fmaxf(row.maximum, one.maximum);
    row.maximum = lane_max(row.maximum);
#pragma unroll
    for (const RowSums& one : heard) {
      if (one.maximum == row.maximum) {
        row.others += one.others;
        row.ties += one.ties;
        row.index = min(row.index, one.index);
      } else {
        const float all = one.others + static_cast<float>(one.ties);
        row.others += all * exp_below(one.maximum, row.maximum);
      }
    }
    row.others = lane_sum(row.others);
    row.ties = lane_count(row.ties);
    row.index = lane_min(row.index);
  }
  // All but one of those that reach the maximum are others. None: there is no number in the row.
  row.others = row.ties > 0 ? row.others + static_cast<float>(row.ties - 1) : NAN;
  if (row.ties == 0) row.index = 0;
  const float inverse = reciprocal(1.0f + row.others);
  *scale = R::kWarps > 1 ? exp_below(warp.maximum, row.maximum) * inverse : inverse;
  return row;
}

template <class R, class T>
__global__ void __launch_bounds__(R::kThreads, R::kBlocks)
    generator_forward_rows_kernel(GeneratorForward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C);
  Group<R> group(block_shared());
  const Columns<R, T> own(C);
  const int64_t part = blockIdx.x / cluster_blocks_of<R>();
  const int64_t first = part * part_rows + threadIdx.x / R::kGroup;
  const int64_t end = min(a.N, (part + 1) * part_rows);
  const bool vectors = has_vectors<T>(a.logits, C);
  float* stats = static_cast<float*>(a.row_stats);
  float sum_of_p[R::kValues] = {};
  double loss = 0;

  uint4 bits[own.kVectors];
  const auto load = [&](int64_t row) { own.load(a.logits, vectors, own.within(row, end), bits); };
  constexpr bool kLoadAhead = kAhead<T> && R::kGroup >= kWarp;
  if (kLoadAhead && own.any(first, end)) load(first);
  for (int64_t row = first; own.any(row, end); row += R::kGroups) {
    float x[R::kValues];
    if (!kLoadAhead) load(row);
    own.unpack_all(bits, x);
    // The next row is on its way while this one is worked on.
    const int64_t next = row + R::kGroups;
    const bool more = own.any(next, end);
    if (kLoadAhead && more) load(next);
    if (!kLoadAhead && more && vectors) own.prefetch(a.logits, own.within(next, end));
    float scale;
    const RowSums sums = row_softmax(group, own, x, &scale);
    if (!own.has(row, end)) scale = 0;
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) sum_of_p[i] += x[i] * scale;
    if (group.thread == 0 && own.has(row, end)) {
      loss += log1p_of(sums.others);
      stats[row] = sums.maximum;
      stats[a.N + row] = sums.others;
      stats[2 * a.N + row] = static_cast<float>(sums.index);
    }
  }

  const Parts<float> parts(a.scratch, a.C);
  float* columns = parts.columns(part);
  if constexpr (R::kGroups > 1) {
    // The block's warps have the same columns: they meet in shared memory, in the warps' order.
    float* meeting = reinterpret_cast<float*>(block_shared() + kReduceBytes);
    constexpr int kWidth = R::kGroup * R::kValues;
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      meeting[threadIdx.x / R::kGroup * kWidth + own.first + own.offset(i)] = sum_of_p[i];
    }
    __syncthreads();  // all warps' sums are there
    for (int k = threadIdx.x; k < C; k += R::kThreads) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < R::kGroups; ++w) sum += meeting[w * kWidth + k];
      columns[k] = sum;
    }
  } else {
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      const int column = own.first + own.offset(i);
      if (column < own.limit) columns[column] = sum_of_p[i];
    }
  }
  // Over the whole block, whatever a group is; a cluster's blocks have parts of |f| of their own,
  // and add them like a row.
  double abs = a.terms.F > 0 ? activation_in<T>(a.terms.features, a.N, a.terms.F, 0, nullptr,
                                                threadIdx.x, R::kThreads)
                             : 0.0;
  if constexpr (R::kGroups > 1) {
    Block<R::kThreads> all(block_shared());
    loss = all.sum(loss);
    abs = all.sum(abs);
  } else {
    abs = group.sum(abs);  // the loss is with thread 0 alone
  }
  if (threadIdx.x == 0 && group.thread == 0) {
    parts.scalars(part)[kOneHot] = loss;
    parts.scalars(part)[kAbs] = abs;
  }
}

// g_k of row_math.h, rounded the same way wherever it is formed: a thread finds that of a row's
// argmax for itself, and g_y - g_y must be 0.
__device__ inline float slope_of(float mean, float centre, float factor) {
  return __fmul_rn(factor, __fadd_rn(log_or_zero(mean), -centre));
}

// What the forward pass has left of a row.
struct RowStats {
  float maximum = 0, others = 0;
  int argmax = 0;

  RowStats() = default;
  __device__ RowStats(const float* stats, int64_t N, int64_t row, int C)
      : maximum(stats[row]), others(stats[N + row]), argmax(class_of(stats[2 * N + row], C)) {}
};

template <class R, class T>
__global__ void __launch_bounds__(R::kThreads, R::kBlocks)
    generator_backward_rows_kernel(GeneratorBackward a) {
  const int C = static_cast<int>(a.C);
  Group<R> group(block_shared());
  const Columns<R, T> own(C);
  const GeneratorFactors factors =
      generator_factors(a.terms, upstream_of(a.upstream, a.upstream_dtype));
  const bool vectors = has_vectors<T>(a.logits, C);
  const bool store_vectors = a.logits.dtype == Vector<T>::kDtype && C % own.kSize == 0;
  const float* stats = static_cast<const float*>(a.row_stats);
  const float* mean = static_cast<const float*>(a.class_mean);
  const float one_hot = static_cast<float>(factors.one_hot);
  const float factor = static_cast<float>(factors.slope);

  // A thread's own columns of the slope, once for all its rows. Subtracting L_ie (sum p_bar log
  // p_bar) from every log p_bar_k changes no gradient, since a row's p sum to 1, and spares fp32 a
  // cancellation.
  float slope[R::kValues], centre = 0;
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) {
    const int column = own.first + own.offset(i);
    slope[i] = column < own.limit ? mean[column] : 0.0f;
    centre += slope[i] * log_or_zero(slope[i]);
  }
  centre = group.sum(centre);
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) slope[i] = slope_of(slope[i], centre, factor);

  // From the last row on, which the forward pass has left in the L2 cache.
  const int blocks = cluster_blocks_of<R>();
  const int64_t step = static_cast<int64_t>(gridDim.x) / blocks * R::kGroups;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) / blocks * R::kGroups + threadIdx.x / R::kGroup;
  uint4 bits[own.kVectors];
  const auto load = [&](int64_t row) { own.load(a.logits, vectors, row, bits); };
  constexpr bool kLoadAhead = kAhead<T> && R::kGroup < kWarp;
  if (kLoadAhead && own.any(first, a.N)) load(a.N - 1 - own.within(first, a.N));
  RowStats ahead;
  float mean_y = 0;
  if (own.any(first, a.N)) {
    ahead = RowStats(stats, a.N, a.N - 1 - own.within(first, a.N), C);
    mean_y = mean[ahead.argmax];
  }
  for (int64_t at = first; own.any(at, a.N); at += step) {
    const int64_t row = a.N - 1 - own.within(at, a.N);
    const int64_t next = a.N - 1 - own.within(at + step, a.N);
    const bool more = own.any(at + step, a.N);
    if (!kLoadAhead) load(row);
    if (!kLoadAhead && more && vectors) own.prefetch(a.logits, next);
    float x[R::kValues];
    own.unpack_all(bits, x);
    if (kLoadAhead && more) load(next);
    const RowStats now = ahead;
    if (more) ahead = RowStats(stats, a.N, next, C);
    const float slope_y = slope_of(mean_y, centre, factor);
    const float inverse = reciprocal(1.0f + now.others);
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      x[i] = exp_below(x[i], now.maximum) * inverse;
      sums[i % 4] += x[i] * (slope[i] - slope_y);
    }
    if (more) mean_y = mean[ahead.argmax];
    const float gap = group.sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const float shift = one_hot - (slope_y + gap);
    const int y = now.argmax - own.first;
    const float at_y = row_math::argmax_gradient(now.others, inverse, gap, one_hot);
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) {
      x[i] = own.offset(i) == y ? at_y : x[i] * (slope[i] + shift);
    }
    if (own.has(at, a.N)) {
      own.store_row(a.grad_logits, a.logits.dtype, store_vectors, row, C, x);
    }
  }
  if (a.terms.F > 0) {
    activation_in<T>(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features, threadIdx.x,
                     R::kThreads);
  }
}

// ---- Adding the parts --------------------------------------------------------------------------

// By a whole block.
template <class S>
__device__ void write_losses(const GeneratorForward& a, const Parts<S>& all, int64_t parts,
                             Block<kAddThreads>& block, const Entropy& entropy) {
  double sums[kGeneratorSums] = {};
  add_scalars(parts, block, sums, [&](int64_t p, int k) { return all.scalars(p)[k]; });
  if (threadIdx.x == 0)
    store_scalars<S>(generator_losses(a.terms, sums, entropy.total()).values, a.losses);
}

// p_bar from the parts, 32 classes a block, and the block's share of the entropy. A single block
// goes on to the losses; otherwise generator_totals_kernel follows.
template <class S>
__global__ void __launch_bounds__(kAddThreads)
    generator_class_mean_kernel(GeneratorForward a, int64_t parts) {
  Block<kAddThreads> block(block_shared());
  double* columns = reinterpret_cast<double*>(block_shared() + kReduceBytes);
  const Parts<S> all(a.scratch, a.C);
  const int lane = threadIdx.x % kWarp;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kColumnsPerBlock + lane;
  const double sum = add_columns(parts, columns, [&](int64_t p) {
    return k < a.C ? static_cast<double>(all.columns(p)[k]) : 0.0;
  });
  const double mean = sum / static_cast<double>(a.N);
  if (threadIdx.x < kWarp && k < a.C) static_cast<S*>(a.class_mean)[k] = static_cast<S>(mean);
  const Entropy entropy = Entropy::of(mean, log_or_zero(mean)).lane_sums();
  if (gridDim.x == 1) {
    write_losses(a, all, parts, block, entropy);
  } else if (threadIdx.x == 0) {
    all.behind(parts)[2 * blockIdx.x] = entropy.p_log_p;
    all.behind(parts)[2 * blockIdx.x + 1] = entropy.rest;
  }
}

template <class S>
__global__ void __launch_bounds__(kAddThreads)
    generator_totals_kernel(GeneratorForward a, int64_t parts) {
  Block<kAddThreads> block(block_shared());
  const Parts<S> all(a.scratch, a.C);
  const int64_t count = (a.C + kColumnsPerBlock - 1) / kColumnsPerBlock;
  double sums[2] = {};
  add_scalars(count, block, sums, [&](int64_t i, int k) { return all.behind(parts)[2 * i + k]; });
  write_losses(a, all, parts, block, Entropy(sums[0], sums[1]));
}

template <class S>
cudaError_t launch_add_parts(const GeneratorForward& args, const Plan& plan, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.C, kColumnsPerBlock);
  cudaError_t error = launch(generator_class_mean_kernel<S>, dim3(blocks), kAddThreads, 1,
                             kAddPartsBytes, stream, args, plan.parts);
  if (error == cudaSuccess && blocks > 1) {
    error = launch(generator_totals_kernel<S>, dim3(1), kAddThreads, 1, kAddPartsBytes, stream,
                   args, plan.parts);
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
    error = with_type(args.logits.dtype, [&](auto type) {
      return with_rows(plan, [&](auto rows) {
        return launch(generator_forward_rows_kernel<decltype(rows), decltype(type)>,
                      dim3(plan.blocks), plan.threads, plan.cluster, plan.shared, stream, args,
                      plan.rows);
      });
    });
  }
  if (error != cudaSuccess || plan.one_launch) return error;
  return args.f64 ? launch_add_parts<double>(args, plan, stream)
                  : launch_add_parts<float>(args, plan, stream);
}

cudaError_t launch_generator_backward(const GeneratorBackward& args, const Plan& plan,
                                      cudaStream_t stream) {
  const dim3 blocks(plan.backward_blocks);
  if (plan.regime == Regime::stream) {
    const auto kernel = args.f64 ? generator_backward_stream_kernel<double>
                                 : generator_backward_stream_kernel<float>;
    return launch(kernel, blocks, plan.threads, 1, plan.shared, stream, args);
  }
  if (plan.regime == Regime::tile) return launch_generator_backward_tile(args, plan, stream);
  return with_type(args.logits.dtype, [&](auto type) {
    return with_rows(plan, [&](auto rows) {
      return launch(generator_backward_rows_kernel<decltype(rows), decltype(type)>, blocks,
                    plan.threads, plan.cluster, plan.shared, stream, args);
    });
  });
}

}  // namespace cuda
}  // namespace dafl
