// The generator's loss for any size, and in fp64: a block a row, which is read more than once. For
// generator_loss.cu, which has the formulas.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace dafl {
namespace cuda {
namespace {

// Row statistics, a block a row, part by part.
template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    generator_stats_stream_kernel(GeneratorForward a, int64_t part_rows) {
  Block<kStreamThreads> block(block_shared());
  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  S* stats = static_cast<S*>(a.row_stats);
  double loss = 0;
  for (int64_t row = begin; row < end; ++row) {
    Best<S> best{lowest(S(0)), static_cast<int>(threadIdx.x)};
    for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads) {
      best.take(load<S>(a.logits, row, k), static_cast<int>(k));
    }
    best = block_best(block, best);
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
  const double abs = block.sum(a.terms.F > 0 ? activation(a.terms.features, a.N, a.terms.F, 0,
                                                          nullptr, threadIdx.x, kStreamThreads)
                                             : 0.0);
  if (threadIdx.x == 0) {
    double* scalars = Parts<S>(a.scratch, a.C).scalars(blockIdx.x);
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
  Parts<S>(a.scratch, a.C).columns(blockIdx.y)[k] = static_cast<S>(sum);
}

template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    generator_backward_stream_kernel(GeneratorBackward a) {
  Block<kStreamThreads> block(block_shared());
  const GeneratorFactors factors =
      generator_factors(a.terms, upstream_of(a.upstream, a.upstream_dtype));
  const S* stats = static_cast<const S*>(a.row_stats);
  const S* mean = static_cast<const S*>(a.class_mean);
  const S one_hot = static_cast<S>(factors.one_hot), factor = static_cast<S>(factors.slope);

  for (int64_t row = blockIdx.x; row < a.N; row += gridDim.x) {
    const S maximum = stats[row], others = stats[a.N + row];
    const int argmax = class_of(stats[2 * a.N + row], static_cast<int>(a.C));
    const S inverse = S(1) / (S(1) + others);
    const S log_y = log_or_zero(mean[argmax]);
    S gap = 0;
    for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads) {
      const S p = exp_of(load<S>(a.logits, row, k) - maximum) * inverse;
      gap += k == argmax ? S(0) : p * (factor * (log_or_zero(mean[k]) - log_y));
    }
    gap = block.sum(gap);
    for (int64_t k = threadIdx.x; k < a.C; k += kStreamThreads) {
      const S p = exp_of(load<S>(a.logits, row, k) - maximum) * inverse;
      const S slope = factor * (log_or_zero(mean[k]) - log_y);
      store(a.grad_logits, a.logits.dtype, row * a.C + k,
            k == argmax ? row_math::argmax_gradient(others, inverse, gap, one_hot)
                        : p * ((slope - gap) + one_hot));
    }
  }
  if (a.terms.F > 0) {
    activation(a.terms.features, a.N, a.terms.F, factors.sign, a.grad_features, threadIdx.x,
               kStreamThreads);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace dafl
