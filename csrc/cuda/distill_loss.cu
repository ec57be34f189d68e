// The student's loss and its gradient, for student and teacher logits s, t [N, C] at temperature
// tau, with q = softmax(. / tau):
//
//   KL = mean over rows of sum_k q_t log(q_t / q_s)      total = KL, or tau^2 KL
//   d total / d s_k = factor (q_s - q_t),   factor = tau / N with tau^2, else 1 / (tau N)
//
// Fused: both softmaxes and log-softmaxes, their divergence, the argmax agreement and the gradient.
// Never materialised: q_s, q_t, their logarithms. KL is summed from terms q_t f(a) >= 0, see
// row_math.h, so that a student close to its teacher does not cancel.
//
// The forward pass reads s and t once and leaves each row's maxima and log-sums; the backward pass
// reads both again and writes the gradient, element by element. With E = N C bytes-per-logit that
// is 5 E + 32 N bytes for both.
//
// Losses are summed per part (see plan.h) and added in order by a second launch, whose start is
// the barrier that all parts wait for; up to 1024 rows of up to 32 classes are one cluster, whose
// barrier takes that place, and one launch. Within a row, threads wait for each other twice, to
// agree on its maxima and on its sums.
#include "distill_row.cuh"

namespace dafl {
namespace cuda {
namespace {

// Parts in scratch: [parts][2].
enum { kKl, kAgreeing, kWidth };

// ---- Tiles -------------------------------------------------------------------------------------

template <bool kOneLaunch>
__global__ void __launch_bounds__(kTileThreads, 4)
    distill_forward_tile_kernel(DistillForward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C), pitch = tile_pitch(C);
  const TileShared shared(block_shared(), pitch);
  Group<kTileThreads, false> block(block_shared());
  if constexpr (kOneLaunch) meet_cluster();
  const float scale = static_cast<float>(a.inverse_temperature);
  float* stats = static_cast<float*>(a.row_stats);

  const int64_t begin = min(a.N, blockIdx.x * part_rows), end = min(a.N, begin + part_rows);
  double kl = 0, agreeing = 0;
  for (int64_t at = begin; at < end; at += kTileRows) {
    const int rows = static_cast<int>(min(end - at, static_cast<int64_t>(kTileRows)));
    load_tile(a.student, at, rows, C, shared.first);
    load_tile(a.teacher, at, rows, C, shared.second);
    __syncthreads();  // rows were loaded by all threads, and belong to one from here on
    const int mine = threadIdx.x;
    if (mine < rows) {
      float* s = shared.first + mine * pitch;
      const float* t = shared.second + mine * pitch;
      const DistillRow row = distill_row(s, t, C, scale);
      kl += distill_row_kl<false>(s, t, C, row, scale, 0);
      agreeing += row.student.index == row.teacher.index ? 1 : 0;
      stats[at + mine] = row.student.value;
      stats[a.N + at + mine] = log_of(row.sum_s);
      stats[2 * a.N + at + mine] = row.teacher.value;
      stats[3 * a.N + at + mine] = log_of(row.sum_t);
    }
    __syncthreads();  // before the next tile overwrites this one
  }
  kl = block.sum(kl);
  agreeing = block.sum(agreeing);
  if constexpr (kOneLaunch) {
    if (threadIdx.x == 0) {
      shared.sums[kKl] = kl;
      shared.sums[kAgreeing] = agreeing;
    }
    __syncthreads();  // sums[] is complete
    gather_sums(shared, kWidth);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      write_distill_losses<float>(a.N, a.scale, gathered_sum(shared, kKl),
                                  gathered_sum(shared, kAgreeing), a.losses);
    }
  } else if (threadIdx.x == 0) {
    a.scratch[blockIdx.x * kWidth + kKl] = kl;
    a.scratch[blockIdx.x * kWidth + kAgreeing] = agreeing;
  }
}

// ---- Rows shared by a warp, a block or a cluster -----------------------------------------------

// body(column, s, t) for a thread's own columns of a row.
template <int kGroup, class Body>
__device__ void for_pairs(const DistillForward& a, bool quads, int64_t row, Columns own,
                          Body body) {
  const int64_t start_s = row * a.student.row_stride, start_t = row * a.teacher.row_stride;
  if (quads) {
#pragma unroll 2
    for (int k = own.first; k < own.limit; k += 4 * kGroup) {
      const float4 s = load_quad(a.student.data, a.student.dtype, start_s + k);
      const float4 t = load_quad(a.teacher.data, a.teacher.dtype, start_t + k);
      body(k, s.x, t.x);
      body(k + 1, s.y, t.y);
      body(k + 2, s.z, t.z);
      body(k + 3, s.w, t.w);
    }
  } else {
    for (int k = own.first; k < own.limit; k += 4 * kGroup) {
      for (int i = k; i < min(k + 4, own.limit); ++i) {
        body(i, load<float>(a.student, row, i), load<float>(a.teacher, row, i));
      }
    }
  }
}

// Three passes over both rows: maxima, sums, divergence. The first comes from memory, the others
// from the L1 cache, which holds what a multiprocessor works on; two rows in registers would not
// leave enough of them.
template <class R>
__global__ void __launch_bounds__(R::kThreads, R::kBlocks)
    distill_forward_rows_kernel(DistillForward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C);
  Group<R::kGroup, R::kCluster> group(block_shared());
  const PartOfRows<R> rows(a.N, C, part_rows);
  const bool quads = has_quads(a.student, C) && has_quads(a.teacher, C);
  const float scale = static_cast<float>(a.inverse_temperature);
  float* stats = static_cast<float*>(a.row_stats);
  double kl = 0, agreeing = 0;

  for (int64_t row = rows.first; row < rows.end; row += R::kGroups) {
    const int first = rows.own.first;
    BestPair best{{lowest(0.0f), first}, {lowest(0.0f), first}};
    for_pairs<R::kGroup>(a, quads, row, rows.own, [&](int column, float s, float t) {
      if (s > best.a.value) best.a = {s, column};
      if (t > best.b.value) best.b = {t, column};
    });
    best = group.reduce(best, BetterPairs());
    const float best_s = best.a.value, best_t = best.b.value;
    Pair sums{0, 0};
    for_pairs<R::kGroup>(a, quads, row, rows.own, [&](int, float s, float t) {
      sums.a += exp_of((s - best_s) * scale);
      sums.b += exp_of((t - best_t) * scale);
    });
    sums = group.reduce(sums, AddPairs());
    const float inverse_s = reciprocal(sums.a), inverse_t = reciprocal(sums.b);
    const float log_s = log_of(sums.a), log_t = log_of(sums.b);
    const float shift = best_t - best_s, log_sum_ratio = log_t - log_s;
    float row_kl = 0;
    for_pairs<R::kGroup>(a, quads, row, rows.own, [&](int, float s, float t) {
      const float q_s = exp_of((s - best_s) * scale) * inverse_s;
      const float q_t = exp_of((t - best_t) * scale) * inverse_t;
      const float ratio = row_math::log_ratio<float>(t, s, shift, log_sum_ratio, scale);
      row_kl += row_math::kl_term<float>(q_t, q_s, ratio);
    });
    kl += static_cast<double>(row_kl);
    if (group.thread == 0) {
      agreeing += best.a.index == best.b.index ? 1 : 0;
      stats[row] = best_s;
      stats[a.N + row] = log_s;
      stats[2 * a.N + row] = best_t;
      stats[3 * a.N + row] = log_t;
    }
  }
  __syncthreads();  // the slots are free: see generator_forward_rows_kernel
  Group<R::kThreads, R::kCluster> all(block_shared());
  kl = all.sum(kl);
  agreeing = all.sum(agreeing);
  if (all.thread == 0) {
    a.scratch[rows.part * kWidth + kKl] = kl;
    a.scratch[rows.part * kWidth + kAgreeing] = agreeing;
  }
}

// ---- Any size, and fp64 ------------------------------------------------------------------------

template <class S>
__global__ void __launch_bounds__(kStreamThreads)
    distill_forward_stream_kernel(DistillForward a, int64_t part_rows) {
  Group<kStreamThreads, false> block(block_shared());
  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  const S scale = static_cast<S>(a.inverse_temperature);
  S* stats = static_cast<S*>(a.row_stats);
  double kl = 0, agreeing = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int first = threadIdx.x;
    Best<S> best_s{lowest(S(0)), first}, best_t{lowest(S(0)), first};
    for (int64_t k = first; k < a.C; k += kStreamThreads) {
      const S s = load<S>(a.student, row, k), t = load<S>(a.teacher, row, k);
      if (s > best_s.value) best_s = {s, static_cast<int>(k)};
      if (t > best_t.value) best_t = {t, static_cast<int>(k)};
    }
    best_s = block.reduce(best_s, Better());
    best_t = block.reduce(best_t, Better());
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

// ---- Backward, for every shape: with the row statistics it is one element after another --------

// Rows of up to kSegment columns, or segments of longer ones, go to the warps or blocks in turn.
constexpr int64_t kSegment = 4096;

template <class S, int kGroup>
__global__ void __launch_bounds__(kStreamThreads)
    distill_backward_kernel(DistillBackward a, int64_t segments) {
  constexpr int kGroups = kStreamThreads / kGroup;
  const S scale = static_cast<S>(a.inverse_temperature);
  const double upstream = upstream_of(a.upstream, a.upstream_dtype);
  const S factor = static_cast<S>(upstream * a.scale * a.per_row);
  const S* stats = static_cast<const S*>(a.row_stats);
  // fp32 statistics, four columns at a time where all three matrices allow it.
  const bool quads = sizeof(S) == 4 && has_quads(a.student, a.C) && has_quads(a.teacher, a.C);

  const int64_t step = static_cast<int64_t>(gridDim.x) * kGroups;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup;
  for (int64_t item = first; item < a.N * segments; item += step) {
    const int64_t row = segments == 1 ? item : item / segments;
    const int64_t begin = segments == 1 ? 0 : (item - row * segments) * kSegment;
    const int64_t end = segments == 1 ? a.C : min(a.C, begin + kSegment);
    const S best_s = stats[row], log_s = stats[a.N + row];
    const S best_t = stats[2 * a.N + row], log_t = stats[3 * a.N + row];
    const S shift = best_t - best_s, log_sum_ratio = log_t - log_s;
    const auto gradient = [&](S s, S t) {
      const S q_s = exp_of((s - best_s) * scale - log_s);
      const S q_t = exp_of((t - best_t) * scale - log_t);
      const S ratio = row_math::log_ratio<S>(t, s, shift, log_sum_ratio, scale);
      return row_math::kl_gradient<S>(q_t, q_s, ratio) * factor;
    };
    if (quads) {
      const auto float_gradient = [&](float s, float t) {
        return static_cast<float>(gradient(static_cast<S>(s), static_cast<S>(t)));
      };
#pragma unroll 4
      for (int64_t k = begin + threadIdx.x % kGroup * 4; k < end; k += 4 * kGroup) {
        const float4 s = load_quad(a.student.data, a.student.dtype, row * a.student.row_stride + k);
        const float4 t = load_quad(a.teacher.data, a.teacher.dtype, row * a.teacher.row_stride + k);
        store_quad(a.grad_student, a.student.dtype, row * a.C + k,
                   make_float4(float_gradient(s.x, t.x), float_gradient(s.y, t.y),
                               float_gradient(s.z, t.z), float_gradient(s.w, t.w)));
      }
    } else {
      for (int64_t k = begin + threadIdx.x % kGroup; k < end; k += kGroup) {
        store(a.grad_student, a.student.dtype, row * a.C + k,
              gradient(load<S>(a.student, row, k), load<S>(a.teacher, row, k)));
      }
    }
  }
}

__global__ void __launch_bounds__(kTileThreads, 4)
    distill_backward_tile_kernel(DistillBackward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C), pitch = tile_pitch(C);
  const TileShared shared(block_shared(), pitch);
  const float scale = static_cast<float>(a.inverse_temperature);
  const double upstream = upstream_of(a.upstream, a.upstream_dtype);
  const float factor = static_cast<float>(upstream * a.scale * a.per_row);
  const float* stats = static_cast<const float*>(a.row_stats);

  const int64_t begin = min(a.N, blockIdx.x * part_rows), end = min(a.N, begin + part_rows);
  for (int64_t at = begin; at < end; at += kTileRows) {
    const int rows = static_cast<int>(min(end - at, static_cast<int64_t>(kTileRows)));
    load_tile(a.student, at, rows, C, shared.first);
    load_tile(a.teacher, at, rows, C, shared.second);
    __syncthreads();  // rows were loaded by all threads, and belong to one from here on
    const int mine = threadIdx.x;
    if (mine < rows) {
      float* s = shared.first + mine * pitch;
      const float* t = shared.second + mine * pitch;
      const float best_s = stats[at + mine], log_s = stats[a.N + at + mine];
      const float best_t = stats[2 * a.N + at + mine], log_t = stats[3 * a.N + at + mine];
      for (int k = 0; k < C; ++k) {
        const float q_s = exp_of((s[k] - best_s) * scale - log_s);
        const float q_t = exp_of((t[k] - best_t) * scale - log_t);
        const float ratio =
            row_math::log_ratio<float>(t[k], s[k], best_t - best_s, log_t - log_s, scale);
        s[k] = row_math::kl_gradient<float>(q_t, q_s, ratio) * factor;
      }
    }
    __syncthreads();  // rows are stored by all threads
    store_tile(a.grad_student, a.student.dtype, at, rows, C, shared.first);
    __syncthreads();  // before the next tile overwrites this one
  }
}

// ---- Adding the parts --------------------------------------------------------------------------

template <class S>
__global__ void __launch_bounds__(8 * kColumnsPerBlock)
    distill_totals_kernel(DistillForward a, int64_t parts) {
  double* shared = reinterpret_cast<double*>(block_shared());
  const int lane = threadIdx.x % kWarp;
  const double sum = add_parts(a.scratch, parts, kWidth, lane < kWidth ? lane : -1, shared);
  const double agreeing = __shfl_sync(0xffffffffu, sum, kAgreeing);
  if (threadIdx.x == 0) write_distill_losses<S>(a.N, a.scale, sum, agreeing, a.losses);
}

}  // namespace

cudaError_t launch_distill_forward(const DistillForward& args, const Plan& plan,
                                   cudaStream_t stream) {
  const dim3 blocks(plan.blocks);
  cudaError_t error;
  if (plan.regime == Regime::stream) {
    const auto kernel =
        args.f64 ? distill_forward_stream_kernel<double> : distill_forward_stream_kernel<float>;
    error = launch(kernel, blocks, plan.threads, 1, plan.shared, stream, args, plan.rows);
  } else if (plan.regime == Regime::tile) {
    const auto kernel =
        plan.one_launch ? distill_forward_tile_kernel<true> : distill_forward_tile_kernel<false>;
    error =
        launch(kernel, blocks, plan.threads, plan.cluster, plan.shared, stream, args, plan.rows);
  } else {
    error = with_rows(plan, [&](auto rows) {
      return launch(distill_forward_rows_kernel<decltype(rows)>, blocks, plan.threads, plan.cluster,
                    plan.shared, stream, args, plan.rows);
    });
  }
  if (error != cudaSuccess || plan.one_launch) return error;
  return launch(args.f64 ? distill_totals_kernel<double> : distill_totals_kernel<float>, dim3(1),
                8 * kColumnsPerBlock, 1, kAddPartsBytes, stream, args, plan.parts);
}

cudaError_t launch_distill_backward(const DistillBackward& args, const Plan& plan,
                                    cudaStream_t stream) {
  if (plan.regime == Regime::tile) {
    return launch(distill_backward_tile_kernel, dim3(plan.blocks), plan.threads, 1, plan.shared,
                  stream, args, plan.rows);
  }
  const bool warps = args.C <= 1024;
  const int64_t segments = args.C <= kSegment ? 1 : ceil_div(args.C, kSegment);
  const int64_t items = args.N * segments;
  // Enough blocks to fill any GPU; they are all alike, so a round more costs nothing.
  const int64_t blocks = smallest(ceil_div(items, warps ? kStreamThreads / kWarp : 1), 1 << 16);
  const auto kernel = args.f64 ? (warps ? distill_backward_kernel<double, kWarp>
                                        : distill_backward_kernel<double, kStreamThreads>)
                               : (warps ? distill_backward_kernel<float, kWarp>
                                        : distill_backward_kernel<float, kStreamThreads>);
  return launch(kernel, dim3(blocks), kStreamThreads, 1, 0, stream, args, segments);
}

}  // namespace cuda
}  // namespace dafl
