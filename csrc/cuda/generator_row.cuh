// The generator loss of one row and of the batch mean, as the tile kernels of generator_loss.cu
// and joint_losses.cu share them.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace dafl {
namespace cuda {

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

// What the gradients are made of, from the upstream gradient and the weights.
struct GeneratorFactors {
  double one_hot, slope, sign;

  __device__ GeneratorFactors(double upstream, const GeneratorTerms& terms)
      : one_hot(upstream * terms.one_hot * terms.per_row),
        slope(upstream * terms.entropy * terms.per_row * terms.per_nat),
        sign(-upstream * terms.activation * terms.per_feature) {}
};

// p_log_p: sum of p_bar log p_bar, in nats.
template <class S>
__device__ void write_generator_losses(const GeneratorTerms& terms, double one_hot_sum,
                                       double abs_sum, double p_log_p, void* const* losses) {
  const double one_hot = one_hot_sum * terms.per_row;
  const double entropy = p_log_p * terms.per_nat;
  const double activation = -abs_sum * terms.per_feature;
  *static_cast<S*>(losses[0]) = static_cast<S>(terms.one_hot * one_hot + terms.entropy * entropy +
                                               terms.activation * activation);
  *static_cast<S*>(losses[1]) = static_cast<S>(one_hot);
  *static_cast<S*>(losses[2]) = static_cast<S>(entropy);
  *static_cast<S*>(losses[3]) = static_cast<S>(activation);
}

}  // namespace cuda
}  // namespace dafl
