// The fused losses as operators of dafl_fast. autograd.cpp defines, dispatches and differentiates
// them; cpu.cpp and cuda.cpp run them; the kernels below (../cpu, ../cuda) know nothing of torch.
//
// Inputs are fp32, bf16, fp16 or fp64, of any strides, and may differ in dtype from each other.
// Losses and statistics are fp32, or fp64 where the logits are ("statistics dtype"); gradients
// have the dtype of their input and are contiguous.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "generator_terms.h"

namespace dafl {

using at::Tensor;

struct GeneratorOutputs {
  std::array<Tensor, kGeneratorLosses> losses;  // total and parts, each []
  Tensor row_stats;   // [3, N]: maximum m, d' = sum over k != y of exp(t_k - m), argmax y
  Tensor class_mean;  // [C]: p_bar
};

struct GeneratorGradients {
  Tensor logits;    // [N, C]
  Tensor features;  // [N, F], or [0] without features
};

constexpr int kDistillLosses = 3;

struct DistillOutputs {
  std::array<Tensor, kDistillLosses> losses;  // total, kl, agreement, each []
  Tensor row_stats;                           // [4, N]: m_s, log d_s, m_t, log d_t (d: sum of exps)
};

// Both losses, and the gradients of their totals for an upstream gradient of 1.
struct JointOutputs {
  std::array<Tensor, kGeneratorLosses> generator;
  std::array<Tensor, kDistillLosses> distill;
  GeneratorGradients teacher;
  Tensor grad_student;  // [N, C]
};

// The operators of one device. Logits are [N, C], features [N, F]; only totals have a gradient,
// and the joint losses none.
struct DeviceLosses {
  GeneratorOutputs (*generator)(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                                const GeneratorWeights&);
  GeneratorGradients (*generator_backward)(const Tensor& grad_total, const Tensor& teacher_logits,
                                           const std::optional<Tensor>& features,
                                           const Tensor& row_stats, const Tensor& class_mean,
                                           const GeneratorWeights&);
  DistillOutputs (*distill)(const Tensor& student_logits, const Tensor& teacher_logits,
                            double temperature, bool scale_by_t2);
  Tensor (*distill_backward)(const Tensor& grad_total, const Tensor& student_logits,
                             const Tensor& teacher_logits, const Tensor& row_stats,
                             double temperature, bool scale_by_t2);
  JointOutputs (*joint)(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                        const Tensor& student_logits, const GeneratorWeights&, double temperature,
                        bool scale_by_t2);
};

extern const DeviceLosses cpu_losses;
extern const DeviceLosses cuda_losses;  // only in builds with CUDA

// ---- Through the dispatcher, results as the schemas have them ----------------------------------

using GeneratorTuple =
    decltype(std::tuple_cat(std::array<Tensor, kGeneratorLosses>(), std::array<Tensor, 2>()));
using DistillTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using JointTuple = decltype(std::tuple_cat(std::array<Tensor, kGeneratorLosses + kDistillLosses>(),
                                           std::array<Tensor, 3>()));

GeneratorTuple generator_loss(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                              const GeneratorWeights&);
DistillTuple distill_loss(const Tensor& student_logits, const Tensor& teacher_logits,
                          double temperature, bool scale_by_t2);
JointTuple dafl_losses(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                       const Tensor& student_logits, const GeneratorWeights&, double temperature,
                       bool scale_by_t2);

// An operator has an argument for each weight: Weight<I>... with these I.
using WeightIndices = std::make_index_sequence<kGeneratorWeights>;
template <size_t>
using Weight = double;

}  // namespace dafl
