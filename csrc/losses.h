// The operators of dafl_fast. losses.cpp checks, allocates and dispatches; the kernels below it
// (cpu/, cuda/) know nothing of torch.
//
// Inputs are fp32, bf16, fp16 or fp64, of any strides, and may differ in dtype from each other.
// Losses and statistics are fp32, or fp64 where the logits are ("statistics dtype"); gradients
// have the dtype of their input and are contiguous.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dafl {

using at::Tensor;

// total [], one_hot [], entropy [], activation [], row_stats [3, N], class_mean [C].
// row_stats: row maximum m, d' = sum over k != y of exp(t_k - m), argmax y; class_mean: p_bar.
using GeneratorOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// grad_logits [N, C], grad_features [N, F] (or [0] without features)
using GeneratorGradients = std::tuple<Tensor, Tensor>;
// total [], kl [], agreement [], row_stats [4, N]: m_s, log d_s, m_t, log d_t (d: sum of exps)
using DistillOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// generator_total, one_hot, entropy, activation, distill_total, kl, agreement (all []), and the
// gradients of their totals: grad_teacher [N, C], grad_features [N, F] or [0], grad_student [N, C]
using JointOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// ---- The operators, through the dispatcher (differentiable) ----

GeneratorOutputs generator_loss(const Tensor& teacher_logits,           // [N, C]
                                const std::optional<Tensor>& features,  // [N, F]
                                double one_hot, double entropy, double activation, double log_base);

GeneratorGradients generator_loss_backward(const Tensor& grad_total,               // []
                                           const Tensor& teacher_logits,           // [N, C]
                                           const std::optional<Tensor>& features,  // [N, F]
                                           const Tensor& row_stats,                // [3, N]
                                           const Tensor& class_mean,               // [C]
                                           double one_hot, double entropy, double activation,
                                           double log_base);

DistillOutputs distill_loss(const Tensor& student_logits,  // [N, C]
                            const Tensor& teacher_logits,  // [N, C]
                            double temperature, bool scale_by_t2);

Tensor distill_loss_backward(const Tensor& grad_total,      // []
                             const Tensor& student_logits,  // [N, C]
                             const Tensor& teacher_logits,  // [N, C]
                             const Tensor& row_stats,       // [4, N]
                             double temperature, bool scale_by_t2);

// Both losses with their gradients for an upstream gradient of 1; not differentiable itself.
JointOutputs dafl_losses(const Tensor& teacher_logits,           // [N, C]
                         const std::optional<Tensor>& features,  // [N, F]
                         const Tensor& student_logits,           // [N, C]
                         double one_hot, double entropy, double activation, double log_base,
                         double temperature, bool scale_by_t2);

// ---- Their kernels per dispatch key, same arguments ----

GeneratorOutputs generator_loss_autograd(const Tensor&, const std::optional<Tensor>&, double,
                                         double, double, double);
DistillOutputs distill_loss_autograd(const Tensor&, const Tensor&, double, bool);

GeneratorOutputs generator_loss_cpu(const Tensor&, const std::optional<Tensor>&, double, double,
                                    double, double);
GeneratorGradients generator_loss_backward_cpu(const Tensor&, const Tensor&,
                                               const std::optional<Tensor>&, const Tensor&,
                                               const Tensor&, double, double, double, double);
DistillOutputs distill_loss_cpu(const Tensor&, const Tensor&, double, bool);
Tensor distill_loss_backward_cpu(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                 bool);
JointOutputs dafl_losses_cpu(const Tensor&, const std::optional<Tensor>&, const Tensor&, double,
                             double, double, double, double, bool);

// Only in builds with CUDA (losses_cuda.cpp).
GeneratorOutputs generator_loss_cuda(const Tensor&, const std::optional<Tensor>&, double, double,
                                     double, double);
GeneratorGradients generator_loss_backward_cuda(const Tensor&, const Tensor&,
                                                const std::optional<Tensor>&, const Tensor&,
                                                const Tensor&, double, double, double, double);
DistillOutputs distill_loss_cuda(const Tensor&, const Tensor&, double, bool);
Tensor distill_loss_backward_cuda(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  double, bool);
JointOutputs dafl_losses_cuda(const Tensor&, const std::optional<Tensor>&, const Tensor&, double,
                              double, double, double, double, bool);

// Shapes and dtypes only: fake tensors, torch.compile.
GeneratorOutputs generator_loss_meta(const Tensor&, const std::optional<Tensor>&, double, double,
                                     double, double);
GeneratorGradients generator_loss_backward_meta(const Tensor&, const Tensor&,
                                                const std::optional<Tensor>&, const Tensor&,
                                                const Tensor&, double, double, double, double);
DistillOutputs distill_loss_meta(const Tensor&, const Tensor&, double, bool);
Tensor distill_loss_backward_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  double, bool);
JointOutputs dafl_losses_meta(const Tensor&, const std::optional<Tensor>&, const Tensor&, double,
                              double, double, double, double, bool);

}  // namespace dafl
