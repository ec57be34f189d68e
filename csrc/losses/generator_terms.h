// The terms of the generator's loss, for operators and kernels on every device: their weights, what
// is summed over rows, and what losses and gradients are made of. Torch-free.
//
// To add a term, begin here, and go on in cpu/generator_loss.inl, cuda/generator_loss.cu and
// cuda/tile_losses.cu with what it adds to a row's sums and gradient. Nothing else in csrc names
// the terms.
#pragma once

#include <cmath>

#include "../matrix.h"

namespace dafl {

// As the operators' schemas have them, first those of the unweighted parts.
struct GeneratorWeights {
  double one_hot, entropy, activation, log_base;
};
constexpr const char* kGeneratorWeightNames[] = {"one_hot", "entropy", "activation", "log_base"};
constexpr int kGeneratorWeights = sizeof(GeneratorWeights) / sizeof(double);
constexpr int kGeneratorParts = 3;
constexpr int kGeneratorLosses = 1 + kGeneratorParts;  // the total, then the parts

// Sums over rows, beside those of p: of log(1 + d') and of |f|.
enum { kOneHot, kAbs, kGeneratorSums };

struct GeneratorLosses {
  double values[kGeneratorLosses];

  DAFL_HD GeneratorLosses(const GeneratorWeights& w, double one_hot, double entropy,
                          double activation)
      : values{w.one_hot * one_hot + w.entropy * entropy + w.activation * activation, one_hot,
               entropy, activation} {}
};

// What a gradient has instead of the weights, upstream gradient and means included: the one-hot
// loss's w_oh / N, the slopes' w_ie / (N ln b), and minus the activation loss's w_a / (N F).
struct GeneratorFactors {
  double one_hot, slope, sign;
};

// ---- On the CPU --------------------------------------------------------------------------------

// p_log_p: the sum of p_bar log p_bar, in nats. F = 0: no features.
inline GeneratorLosses generator_losses(const GeneratorWeights& w, const double* sums,
                                        double p_log_p, int64_t N, int64_t F) {
  return {w, sums[kOneHot] / N, p_log_p / std::log(w.log_base), F > 0 ? -sums[kAbs] / N / F : 0};
}

inline GeneratorFactors generator_factors(const GeneratorWeights& w, double upstream, int64_t N,
                                          int64_t F) {
  const double per_row = upstream / N;
  return {per_row * w.one_hot, per_row * w.entropy / std::log(w.log_base),
          F > 0 ? -per_row * w.activation / F : 0};
}

// ---- On a GPU ----------------------------------------------------------------------------------

// Reciprocals, so that threads need not divide or take a logarithm in fp64.
struct GeneratorTerms {
  GeneratorWeights weights;
  double per_row;      // 1 / N
  double per_nat;      // 1 / ln b
  double per_feature;  // 1 / (N F), or 0 without features
  Matrix features;     // [N, F]
  int64_t F;           // 0: no features

  GeneratorTerms(const GeneratorWeights& weights, int64_t N, const Matrix& features, int64_t F)
      : weights(weights),
        per_row(1.0 / static_cast<double>(N)),
        per_nat(1 / std::log(weights.log_base)),
        per_feature(F > 0 ? 1.0 / (static_cast<double>(N) * static_cast<double>(F)) : 0.0),
        features(features),
        F(F) {}
};

DAFL_HD GeneratorLosses generator_losses(const GeneratorTerms& terms, const double* sums,
                                         double p_log_p) {
  return {terms.weights, sums[kOneHot] * terms.per_row, p_log_p * terms.per_nat,
          -sums[kAbs] * terms.per_feature};
}

DAFL_HD GeneratorFactors generator_factors(const GeneratorTerms& terms, double upstream) {
  const GeneratorWeights& w = terms.weights;
  return {upstream * w.one_hot * terms.per_row,
          upstream * w.entropy * terms.per_row * terms.per_nat,
          -upstream * w.activation * terms.per_feature};
}

}  // namespace dafl
