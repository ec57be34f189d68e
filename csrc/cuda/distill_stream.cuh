// The distillation loss for any size, and in fp64: a block a row, which is read more than once. For
// distill_loss.cu, which has the formulas.
#pragma once

#include "distill_row.cuh"

namespace dafl {
namespace cuda {
namespace {

// Parts in scratch: [parts][2].
enum { kKl, kAgreeing, kWidth };

// Rows of up to kSegment columns, or segments of longer ones, go to the warps or blocks in turn.
constexpr int64_t kSegment = 4096;

// Which columns of which row.
struct Segment {
  int64_t row, begin, end;

  __device__ Segment(int64_t item, int64_t segments, int64_t C) {
    row = segments == 1 ? item : item / segments;
    begin = segments == 1 ? 0 : (item - row * segments) * kSegment;
    end = segments == 1 ? C : min(C, begin + kSegment);
  }
};

template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    distill_forward_stream_kernel(DistillForward a, int64_t part_rows) {
  Block<kStreamThreads> block(block_shared());
  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  const S scale = static_cast<S>(a.inverse_temperature);
  S* stats = static_cast<S*>(a.row_stats);
  double kl = 0, agreeing = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int first = threadIdx.x;
    Best<S> best_s{lowest(S(0)), first}, best_t{lowest(S(0)), first};
    for (int64_t k = first; k < a.C; k += kStreamThreads) {
      const S s = load<S>(a.student, row, k), t = load<S>(a.teacher, row, k);
      best_s.take(s, static_cast<int>(k));
      best_t.take(t, static_cast<int>(k));
    }
    best_s = block_best(block, best_s);
    best_t = block_best(block, best_t);
    S sum_s = 0, sum_t = 0;
    for (int64_t k = first; k < a.C; k += kStreamThreads) {
      sum_s += exp_of((load<S>(a.student, row, k) - best_s.value) * scale);
      sum_t += exp_of((load<S>(a.teacher, row, k) - best_t.value) * scale);
    }
    sum_s = block.sum(sum_s);
    sum_t = block.sum(sum_t);
    const S log_s = log_of(sum_s), log_t = log_of(sum_t);
    for (int64_t k = first; k < a.C; k += kStreamThreads) {
      const S s = load<S>(a.student, row, k), t = load<S>(a.teacher, row, k);
      const S q_s = exp_of((s - best_s.value) * scale) / sum_s;
      const S q_t = exp_of((t - best_t.value) * scale) / sum_t;
      const S ratio =
          row_math::log_ratio<S>(t, s, best_t.value - best_s.value, log_t - log_s, scale);
      kl += static_cast<double>(row_math::kl_term<S>(q_t, q_s, ratio));
    }
    if (threadIdx.x == 0) {
      agreeing += best_s.index == best_t.index ? 1 : 0;
      stats[row] = best_s.value;
      stats[a.N + row] = log_s;
      stats[2 * a.N + row] = best_t.value;
      stats[3 * a.N + row] = log_t;
    }
  }
  kl = block.sum(kl);
  agreeing = block.sum(agreeing);
  if (threadIdx.x == 0) {
    a.scratch[blockIdx.x * kWidth + kKl] = kl;
    a.scratch[blockIdx.x * kWidth + kAgreeing] = agreeing;
  }
}

__global__ void __launch_bounds__(kStreamThreads)
    distill_backward_f64_kernel(DistillBackward a, int64_t segments) {
  const double upstream = upstream_of(a.upstream, a.upstream_dtype);
  const double factor = upstream * a.scale * a.per_row, scale = a.inverse_temperature;
  const double* stats = static_cast<const double*>(a.row_stats);
  for (int64_t item = blockIdx.x; item < a.N * segments; item += gridDim.x) {
    const Segment at(item, segments, a.C);
    const double best_s = stats[at.row], log_s = stats[a.N + at.row];
    const double best_t = stats[2 * a.N + at.row], log_t = stats[3 * a.N + at.row];
    for (int64_t k = at.begin + threadIdx.x; k < at.end; k += kStreamThreads) {
      const double s = load<double>(a.student, at.row, k), t = load<double>(a.teacher, at.row, k);
      const double q_s = exp((s - best_s) * scale - log_s);
      const double q_t = exp((t - best_t) * scale - log_t);
      const double ratio = row_math::log_ratio<double>(t, s, best_t - best_s, log_t - log_s, scale);
      store(a.grad_student, a.student.dtype, at.row * a.C + k,
            row_math::kl_gradient<double>(q_t, q_s, ratio) * factor);
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace dafl
