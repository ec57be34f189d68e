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
// barrier takes that place, and one launch. Within a row, threads wait for each other once, to
// agree on its maxima and sums.
#include "distill_row.cuh"
#include "distill_stream.cuh"
#include "rows.cuh"

namespace dafl {
namespace cuda {
namespace {

// ---- Tiles -------------------------------------------------------------------------------------

// Without features there is nothing for threads beside those that have rows.
template <bool kOneLaunch>
constexpr int kPairThreads = kOneLaunch ? kTileRows : kTileThreads;

template <bool kOneLaunch, int kC>
__global__ void __launch_bounds__(kPairThreads<kOneLaunch>)
    distill_forward_tile_kernel(DistillForward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C);
  const TileShared shared(block_shared());
  if constexpr (kOneLaunch) shared.begin_meeting();
  const float scale = static_cast<float>(a.inverse_temperature);
  float* stats = static_cast<float*>(a.row_stats);
  const int64_t begin = blockIdx.x * part_rows, end = min(a.N, begin + part_rows);
  double sums[kWidth] = {};
  for (int64_t row = begin + threadIdx.x; row < end; row += kPairThreads<kOneLaunch>) {
    float s[kC], t[kC], log_s, log_t;
    bool agree;
    load_tile_row(a.student, row, C, s);
    load_tile_row(a.teacher, row, C, t);
    const DistillRow one = distill_row(s, t, scale, &agree, &log_s, &log_t);
    sums[kKl] += static_cast<double>(distill_row_kl(s, t, C, one));
    sums[kAgreeing] += agree ? 1 : 0;
    stats[row] = one.max_s;
    stats[a.N + row] = log_s;
    stats[2 * a.N + row] = one.max_t;
    stats[3 * a.N + row] = log_t;
  }
  shared.put<kC>(0.0f, 0, sums);
  __syncthreads();  // all warps' sums are there
  if constexpr (kOneLaunch) {
    shared.end_meeting();
    shared.send(kWidth);
    shared.receive();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      write_distill_losses<float>(a.N, a.scale, shared.gathered_sum(kKl),
                                  shared.gathered_sum(kAgreeing), a.losses);
    }
  } else if (threadIdx.x < kWidth) {
    a.scratch[blockIdx.x * kWidth + threadIdx.x] = shared.block_sum(threadIdx.x);
  }
}

template <int kC>
__global__ void __launch_bounds__(kTileThreads) distill_backward_tile_kernel(DistillBackward a) {
  const int C = static_cast<int>(a.C);
  const float scale = static_cast<float>(a.inverse_temperature);
  const double upstream = upstream_of(a.upstream, a.upstream_dtype);
  const float factor = static_cast<float>(upstream * a.scale * a.per_row);
  const float* stats = static_cast<const float*>(a.row_stats);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTileThreads;
  for (int64_t row = spread_row(); row < a.N; row += step) {
    float s[kC], t[kC];
    load_tile_row(a.student, row, C, s);
    load_tile_row(a.teacher, row, C, t);
    const DistillRow one(stats[row], stats[2 * a.N + row], stats[a.N + row], stats[3 * a.N + row],
                         scale);
    distill_row_gradient(s, t, C, one, factor);
    store_tile_row(a.grad_student, a.student.dtype, row, C, s);
  }
}

// ---- Rows in registers -------------------------------------------------------------------------

// Of one network's row, or a warp's share of it: the maximum, the sum of the other exponentials,
// how many columns reach the maximum, and the lowest of them.
struct HalfSums {
  float maximum = -FLT_MAX, others = 0;
  int ties = 0, index = INT_MAX;
};

// As warps tell them.
struct PairSums {
  HalfSums s, t;
};

// What is subtracted from x exponent, in one FMA, where a maximum belongs to it. The product's
// rounding is in every term of the sum alike, and log_of_sum takes it out again.
__device__ inline float scaled(float maximum, float exponent) {
  return fmaxf(maximum * exponent, -FLT_MAX);
}

// log of sum_k exp((x_k - maximum) / temperature). The maximum's own term is 1: log(1 + others)
// keeps the digits of a row that is sure of its class.
__device__ inline float log_of_sum(const HalfSums& row, float exponent) {
  const float rounding = fmaf(row.maximum, exponent, -scaled(row.maximum, exponent));
  const float others = row.others * exp2_of(-rounding) + static_cast<float>(row.ties - 1);
  return row.ties > 0 ? log1p_of(others) : NAN;
}

// A NaN or an infinity makes the sum NaN.
template <class R, class T>
__device__ HalfSums warp_sums(const Columns<R, T>& own, const float (&x)[R::kValues],
                              float exponent) {
  float best[own.kVectors], sums[4] = {};
  HalfSums warp;
  const float mine = own.maximum(x, best);
  warp.maximum = lane_max<R::kLanes>(mine);
  if (mine == warp.maximum) {
    warp.index = own.lowest(x, best, mine, &warp.ties);
    sums[0] = mine - mine;  // NaN for an infinity, else 0
  }
  const float zero = scaled(warp.maximum, exponent);
#pragma unroll
  for (int i = 0; i < R::kValues; ++i) {
    const float e = exp2_of(fmaf(x[i], exponent, -zero));
    if (x[i] != warp.maximum) sums[i % 4] += e;  // a NaN, too
  }
  warp.others = lane_sum<R::kLanes>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  warp.ties = lane_count<R::kLanes>(warp.ties);
  warp.index = lane_min<R::kLanes>(warp.index);
  return warp;
}

template <int n>
__device__ HalfSums add_warps(const PairSums (&heard)[n], HalfSums PairSums::* half,
                              float exponent) {
  HalfSums row;
#pragma unroll
  for (const PairSums& one : heard) row.maximum = fmaxf(row.maximum, (one.*half).maximum);
  row.maximum = lane_max(row.maximum);
  const float zero = scaled(row.maximum, exponent);
#pragma unroll
  for (const PairSums& pair : heard) {
    const HalfSums& one = pair.*half;
    if (one.maximum == row.maximum) {
      row.others += one.others;
      row.ties += one.ties;
      row.index = min(row.index, one.index);
    } else {
      const float rounding = fmaf(one.maximum, exponent, -scaled(one.maximum, exponent));
      const float all = one.others + static_cast<float>(one.ties) * exp2_of(rounding);
      row.others += all * exp2_of(scaled(one.maximum, exponent) - zero);
    }
  }
  row.others = lane_sum(row.others);
  row.ties = lane_count(row.ties);
  row.index = lane_min(row.index);
  return row;
}

template <class R, class T>
__global__ void __launch_bounds__(R::kThreads, R::kBlocks)
    distill_forward_rows_kernel(DistillForward a, int64_t part_rows) {
  const int C = static_cast<int>(a.C);
  Group<R> group(block_shared());
  const Columns<R, T> own(C);
  const int64_t part = blockIdx.x / cluster_blocks_of<R>();
  const int64_t first = part * part_rows + threadIdx.x / R::kGroup;
  const int64_t end = min(a.N, (part + 1) * part_rows);
  const bool vectors_s = has_vectors<T>(a.student, C), vectors_t = has_vectors<T>(a.teacher, C);
  const float scale = static_cast<float>(a.inverse_temperature), exponent = scale * kLog2E;
  float* stats = static_cast<float*>(a.row_stats);
  double kl = 0;
  int agreeing = 0;

  uint4 bits_s[own.kVectors];
  const auto load = [&](int64_t row) {
    own.load(a.student, vectors_s, own.within(row, end), bits_s);
  };
  constexpr bool kLoadAhead = kAhead<T> && R::kGroup >= kWarp && !R::kCluster;
  if (kLoadAhead && own.any(first, end)) load(first);
  for (int64_t row = first; own.any(row, end); row += R::kGroups) {
    float s[R::kValues], t[R::kValues];
    uint4 bits_t[own.kVectors];
    if (!kLoadAhead) load(row);
    own.load(a.teacher, vectors_t, own.within(row, end), bits_t);
    own.unpack_all(bits_s, s);
    // The next row is on its way while this one is worked on; the teacher's only as far as the L2
    // cache, for want of registers, but the student's part of the work stands before its own.
    const int64_t next = row + R::kGroups;
    const bool more = own.any(next, end);
    if (kLoadAhead && more) load(next);
    if (!kLoadAhead && more && vectors_s) own.prefetch(a.student, own.within(next, end));
    if (more && vectors_t) own.prefetch(a.teacher, own.within(next, end));
    PairSums sums;
    sums.s = warp_sums(own, s, exponent);
    own.unpack_all(bits_t, t);
    sums.t = warp_sums(own, t, exponent);
    if constexpr (R::kWarps > 1) {
      PairSums heard[Group<R>::kHeard];
      group.tell(sums, PairSums(), heard);
      sums.s = add_warps(heard, &PairSums::s, exponent);
      sums.t = add_warps(heard, &PairSums::t, exponent);
    }
    const float log_s = log_of_sum(sums.s, exponent), log_t = log_of_sum(sums.t, exponent);
    const DistillRow one(sums.s.maximum, sums.t.maximum, log_s, log_t, scale);
    float row_kl[2] = {};
#pragma unroll
    for (int i = 0; i < R::kValues; ++i) one.add_kl(s[i], t[i], row_kl[i % 2]);
    if (own.has(row, end)) kl += static_cast<double>(row_kl[0] + row_kl[1]);
    if (group.thread == 0 && own.has(row, end)) {
      agreeing += sums.s.index == sums.t.index ? 1 : 0;
      stats[row] = sums.s.maximum;
      stats[a.N + row] = log_s;
      stats[2 * a.N + row] = sums.t.maximum;
      stats[3 * a.N + row] = log_t;
    }
  }
  if constexpr (R::kGroups > 1) {
    Block<R::kThreads> all(block_shared());
    kl = all.sum(kl);
    agreeing = all.sum(agreeing);
  } else {
    kl = group.sum(kl);  // who agrees is with thread 0 alone
  }
  if (threadIdx.x == 0 && group.thread == 0) {
    a.scratch[part * kWidth + kKl] = kl;
    a.scratch[part * kWidth + kAgreeing] = agreeing;
  }
}

// ---- Backward, for every shape: with the row statistics it is one element after another --------

template <class T, int kGroup>
__global__ void __launch_bounds__(kStreamThreads)
    distill_backward_kernel(DistillBackward a, int64_t segments) {
  constexpr int kGroups = kStreamThreads / kGroup;
  constexpr int kSize = Vector<T>::kSize, kAtOnce = 16 / kSize;  // vectors of each matrix
  const float scale = static_cast<float>(a.inverse_temperature);
  const double upstream = upstream_of(a.upstream, a.upstream_dtype);
  const float factor = static_cast<float>(upstream * a.scale * a.per_row);
  const float* stats = static_cast<const float*>(a.row_stats);
  const bool vectors = has_vectors<T>(a.student, a.C) && has_vectors<T>(a.teacher, a.C);

  const int64_t step = static_cast<int64_t>(gridDim.x) * kGroups;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup;
       item < a.N * segments; item += step) {
    const Segment at(item, segments, a.C);
    const int64_t start_s = at.row * a.student.row_stride;
    const int64_t start_t = at.row * a.teacher.row_stride;
    const DistillRow one(stats[at.row], stats[2 * a.N + at.row], stats[a.N + at.row],
                         stats[3 * a.N + at.row], scale);
    const int lane = threadIdx.x % kGroup;
    if (vectors) {
      for (int64_t k = at.begin + lane * kSize; k < at.end; k += kAtOnce * kGroup * kSize) {
        uint4 bits_s[kAtOnce], bits_t[kAtOnce];
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
          const int64_t column = k + v * kGroup * kSize;
          bits_s[v] = bits_t[v] = make_uint4(0, 0, 0, 0);
          if (column < at.end) {
            bits_s[v] = load_vector<T>(a.student.data, start_s + column);
            bits_t[v] = load_vector<T>(a.teacher.data, start_t + column);
          }
        }
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
          const int64_t column = k + v * kGroup * kSize;
          float s[kSize], t[kSize];
          unpack<T>(bits_s[v], s);
          unpack<T>(bits_t[v], t);
#pragma unroll
          for (int j = 0; j < kSize; ++j) s[j] = one.gradient(s[j], t[j]) * factor;
          if (column < at.end) store_vector<T>(a.grad_student, at.row * a.C + column, pack<T>(s));
        }
      }
    } else {
      for (int64_t k = at.begin + lane; k < at.end; k += kGroup) {
        const float s = load<float>(a.student, at.row, k), t = load<float>(a.teacher, at.row, k);
        store(a.grad_student, a.student.dtype, at.row * a.C + k, one.gradient(s, t) * factor);
      }
    }
  }
}

// ---- Adding the parts --------------------------------------------------------------------------

template <class S>
__global__ void __launch_bounds__(kAddThreads)
    distill_totals_kernel(DistillForward a, int64_t parts) {
  Block<kAddThreads> block(block_shared());
  double sums[kWidth] = {};
  add_scalars(parts, block, sums, [&](int64_t p, int k) { return a.scratch[p * kWidth + k]; });
  if (threadIdx.x == 0) {
    write_distill_losses<S>(a.N, a.scale, sums[kKl], sums[kAgreeing], a.losses);
  }
}

// The element type of both matrices; float, which holds them all, where they differ.
Dtype common_dtype(const Matrix& student, const Matrix& teacher) {
  return student.dtype == teacher.dtype ? student.dtype : Dtype::f32;
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
    error = with_columns(args.C, [&](auto columns) {
      const auto kernel = plan.one_launch ? distill_forward_tile_kernel<true, columns()>
                                          : distill_forward_tile_kernel<false, columns()>;
      const int threads = plan.one_launch ? kPairThreads<true> : kPairThreads<false>;
      return launch(kernel, blocks, threads, plan.cluster, plan.shared, stream, args, plan.rows);
    });
  } else {
    error = with_type(common_dtype(args.student, args.teacher), [&](auto type) {
      return with_rows(plan, [&](auto rows) {
        return launch(distill_forward_rows_kernel<decltype(rows), decltype(type)>, blocks,
                      plan.threads, plan.cluster, plan.shared, stream, args, plan.rows);
      });
    });
  }
  if (error != cudaSuccess || plan.one_launch) return error;
  return launch(args.f64 ? distill_totals_kernel<double> : distill_totals_kernel<float>, dim3(1),
                kAddThreads, 1, kAddPartsBytes, stream, args, plan.parts);
}

cudaError_t launch_distill_backward(const DistillBackward& args, const Plan& plan,
                                    cudaStream_t stream) {
  if (plan.regime == Regime::tile) {
    return with_columns(args.C, [&](auto columns) {
      return launch(distill_backward_tile_kernel<columns()>, dim3(plan.backward_blocks),
                    kTileThreads, 1, 0, stream, args);
    });
  }
  const int64_t segments = args.C <= kSegment ? 1 : ceil_div(args.C, kSegment);
  const int64_t items = args.N * segments;
  // Enough blocks to fill any GPU; they are all alike, so a round more costs nothing.
  constexpr int64_t kMost = 1 << 16;
  if (args.f64) {
    return launch(distill_backward_f64_kernel, dim3(smallest(items, kMost)), kStreamThreads, 1, 0,
                  stream, args, segments);
  }
  return with_type(common_dtype(args.student, args.teacher), [&](auto type) {
    using T = decltype(type);
    if (args.C > 1024) {
      return launch(distill_backward_kernel<T, kStreamThreads>, dim3(smallest(items, kMost)),
                    kStreamThreads, 1, 0, stream, args, segments);
    }
    return launch(distill_backward_kernel<T, kWarp>,
                  dim3(smallest(ceil_div(items, kStreamThreads / kWarp), kMost)), kStreamThreads, 1,
                  0, stream, args, segments);
  });
}

}  // namespace cuda
}  // namespace dafl
