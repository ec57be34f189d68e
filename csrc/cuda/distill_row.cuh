// The distillation loss of one row that one thread owns, as the tile kernels of distill_loss.cu
// and tile_losses.cu share it.
#pragma once

#include "tile.cuh"

namespace dafl {
namespace cuda {

// What the softmaxes of a row's student and teacher logits at temperature 1 / scale need: maxima,
// sums of exponentials and where the maxima are.
struct DistillRow {
  Best<float> student, teacher;
  float sum_s, sum_t;
};

__device__ inline DistillRow distill_row(const float* s, const float* t, int C, float scale) {
  DistillRow row{row_best(s, C), row_best(t, C), 0, 0};
  for (int k = 0; k < C; ++k) {
    row.sum_s += exp_of((s[k] - row.student.value) * scale);
    row.sum_t += exp_of((t[k] - row.teacher.value) * scale);
  }
  return row;
}

// KL of the row; with kGradient, s becomes factor * (q_s - q_t).
template <bool kGradient>
__device__ float distill_row_kl(float* s, const float* t, int C, const DistillRow& row, float scale,
                                float factor) {
  const float inverse_s = reciprocal(row.sum_s), inverse_t = reciprocal(row.sum_t);
  const float shift = row.teacher.value - row.student.value;
  const float log_sum_ratio = log_of(row.sum_t) - log_of(row.sum_s);
  float kl = 0;
  for (int k = 0; k < C; ++k) {
    const float q_s = exp_of((s[k] - row.student.value) * scale) * inverse_s;
    const float q_t = exp_of((t[k] - row.teacher.value) * scale) * inverse_t;
    const float a = row_math::log_ratio<float>(t[k], s[k], shift, log_sum_ratio, scale);
    kl += row_math::kl_term<float>(q_t, q_s, a);
    if (kGradient) s[k] = row_math::kl_gradient<float>(q_t, q_s, a) * factor;
  }
  return kl;
}

template <class S>
__device__ void write_distill_losses(int64_t N, double scale, double kl_sum, double agreeing,
                                     void* const* losses) {
  const double kl = kl_sum / static_cast<double>(N);
  store_scalars<S>({scale * kl, kl, agreeing / static_cast<double>(N)}, losses);
}

}  // namespace cuda
}  // namespace dafl
