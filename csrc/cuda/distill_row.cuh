// The distillation loss of a row's elements and of rows that one thread owns.
#pragma once

#include "tile.cuh"

namespace dafl {
namespace cuda {

// Of one row: maxima, and what turns log q into exponents of 2 and differences of logits into a.
struct DistillRow {
  float max_s, max_t;
  float exponent;        // log2(e) / temperature
  float log2_s, log2_t;  // of the sums of exponentials
  float scale;           // 1 / temperature
  float shift, log_ratio;

  __device__ DistillRow(float max_s, float max_t, float log_s, float log_t, float scale)
      : max_s(max_s),
        max_t(max_t),
        exponent(scale * kLog2E),
        log2_s(log_s * kLog2E),
        log2_t(log_t * kLog2E),
        scale(scale),
        shift(max_t - max_s),
        log_ratio(log_t - log_s) {}

  __device__ float q_s(float s) const { return exp2_of((s - max_s) * exponent - log2_s); }
  __device__ float q_t(float t) const { return exp2_of((t - max_t) * exponent - log2_t); }
  __device__ float a(float s, float t) const {
    return row_math::log_ratio<float>(t, s, shift, log_ratio, scale);
  }

  // row_math::kl_term, added to `sum`. Where a teacher's logit is -inf, q_t is 0 and a is -inf or
  // NaN: any finite a gives their product, 0.
  __device__ void add_kl(float s, float t, float& sum) const {
    const float qs = q_s(s), qt = q_t(t), x = fmaxf(a(s, t), -FLT_MAX);
    const bool near = fabsf(x) < 0.5f;
    sum += qt * (near ? row_math::kl_excess<float>(x) : x - 1.0f);
    if (!near) sum += qs;
  }

  __device__ float gradient(float s, float t) const {
    const float qs = q_s(s), qt = q_t(t), x = a(s, t);
    const float near = qt * (row_math::kl_excess<float>(x) - x);
    return fabsf(x) < 0.5f ? near : qs - qt;
  }
};

// s, t: a row's logits, behind the C-th -inf.
template <int kC>
__device__ DistillRow distill_row(const float (&s)[kC], const float (&t)[kC], float scale,
                                  bool* agree, float* log_s, float* log_t) {
  int index_s, index_t;
  const float max_s = row_best(s, &index_s), max_t = row_best(t, &index_t);
  *agree = index_s == index_t;
  const float exponent = scale * kLog2E;
  // Without the maxima's own terms, which are 1; NaN where there is no number, or an infinity.
  float others_s = index_s < 0 ? NAN : max_s - max_s, others_t = index_t < 0 ? NAN : max_t - max_t;
#pragma unroll
  for (int k = 0; k < kC; ++k) {
    others_s += k == index_s ? 0.0f : exp2_of((s[k] - max_s) * exponent);
    others_t += k == index_t ? 0.0f : exp2_of((t[k] - max_t) * exponent);
  }
  *log_s = log1p_of(others_s);
  *log_t = log1p_of(others_t);
  return DistillRow(max_s, max_t, *log_s, *log_t, scale);
}

template <int kC>
__device__ float distill_row_kl(const float (&s)[kC], const float (&t)[kC], int C,
                                const DistillRow& row) {
  float kl = 0;
#pragma unroll
  for (int k = 0; k < kC; ++k) {
    if (k < C) row.add_kl(s[k], t[k], kl);
  }
  return kl;
}

// s becomes factor * (q_s - q_t).
template <int kC>
__device__ void distill_row_gradient(float (&s)[kC], const float (&t)[kC], int C,
                                     const DistillRow& row, float factor) {
#pragma unroll
  for (int k = 0; k < kC; ++k) {
    if (k < C) s[k] = row.gradient(s[k], t[k]) * factor;
  }
}

template <class S>
__device__ void write_distill_losses(int64_t N, double scale, double kl_sum, double agreeing,
                                     void* const* losses) {
  const double kl = kl_sum / static_cast<double>(N);
  store_scalars<S>({scale * kl, kl, agreeing / static_cast<double>(N)}, losses);
}

}  // namespace cuda
}  // namespace dafl
