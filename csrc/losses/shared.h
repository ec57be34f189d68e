// What the losses' implementations for every device share: checks, allocation, and both losses from
// the four operators of a device.
#pragma once

#include <ATen/ops/ones.h>
#include <c10/util/bit_cast.h>

#include <cmath>
#include <optional>

#include "losses.h"
#include "tensor.h"

namespace dafl {

// ---- Checks ------------------------------------------------------------------------------------

inline void check_logits(const char* name, const Tensor& logits) {
  // Class indices are kept in the statistics' fp32, which counts to 2^24.
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.sym_size(1) >= 1 && logits.sym_size(1) <= (1 << 24),
                    name, " must be [N, C] with 1 to 16777216 classes", got(logits));
  check_dtype(name, logits);
}

inline void check_generator(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                            const GeneratorWeights& weights) {
  check_logits("teacher_logits", teacher_logits);
  if (features) {
    TORCH_CHECK_VALUE(features->dim() == 2 && features->sym_size(0) == teacher_logits.sym_size(0) &&
                          features->device() == teacher_logits.device(),
                      "features must be [N, F] with the N and the device of teacher_logits (",
                      text(teacher_logits.sym_sizes()), " on ", teacher_logits.device(), ")",
                      got(*features));
    check_dtype("features", *features);
  }
  const auto values = c10::bit_cast<std::array<double, kGeneratorWeights>>(weights);
  for (int i = 0; i < kGeneratorParts; ++i) {
    TORCH_CHECK_VALUE(std::isfinite(values[i]), kGeneratorWeightNames[i],
                      " must be a finite weight, got ", values[i]);
  }
  TORCH_CHECK_VALUE(std::isfinite(weights.log_base) && weights.log_base > 1,
                    "log_base must be a finite number greater than 1, got ", weights.log_base);
}

inline void check_distill(const Tensor& student_logits, const Tensor& teacher_logits,
                          double temperature) {
  check_logits("teacher_logits", teacher_logits);
  TORCH_CHECK_VALUE(student_logits.dim() == 2 && student_logits.device() == teacher_logits.device(),
                    "student_logits must be [N, C] on the same device as teacher_logits",
                    got(student_logits));
  TORCH_CHECK_VALUE(student_logits.sym_sizes() == teacher_logits.sym_sizes(),
                    "student_logits must be [N, C] like teacher_logits, which is ",
                    text(teacher_logits.sym_sizes()), got(student_logits));
  check_dtype("student_logits", student_logits);
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0,
                    "temperature must be a finite number greater than 0, got ", temperature);
}

// What the backward operators read besides, for every device.
inline ScalarType stats_dtype(const Tensor& student_logits, const Tensor& teacher_logits) {
  const ScalarType student = stats_dtype(student_logits);
  return student == at::kDouble ? student : stats_dtype(teacher_logits);
}

inline void check_upstream(const char* name, const Tensor& grad_total, const Tensor& logits) {
  TORCH_CHECK_VALUE(grad_total.sym_numel() == 1 && grad_total.device() == logits.device(), name,
                    " must be one number on ", logits.device(), got(grad_total));
  check_dtype(name, grad_total);
}

inline void check_generator_backward(const Tensor& grad_total, const Tensor& teacher_logits,
                                     const std::optional<Tensor>& features, const Tensor& row_stats,
                                     const Tensor& class_mean, const GeneratorWeights& weights) {
  check_generator(teacher_logits, features, weights);
  check_upstream("generator_loss_backward's grad_total", grad_total, teacher_logits);
  const ScalarType type = stats_dtype(teacher_logits);
  check_argument("generator_loss_backward's row_stats", row_stats, {3, teacher_logits.sym_size(0)},
                 type, teacher_logits);
  check_argument("generator_loss_backward's class_mean", class_mean, {teacher_logits.sym_size(1)},
                 type, teacher_logits);
}

inline void check_distill_backward(const Tensor& grad_total, const Tensor& student_logits,
                                   const Tensor& teacher_logits, const Tensor& row_stats,
                                   double temperature) {
  check_distill(student_logits, teacher_logits, temperature);
  check_upstream("distill_loss_backward's grad_total", grad_total, student_logits);
  check_argument("distill_loss_backward's row_stats", row_stats, {4, student_logits.sym_size(0)},
                 stats_dtype(student_logits, teacher_logits), student_logits);
}

// ---- Allocation --------------------------------------------------------------------------------

inline bool is_f64(const Tensor& stats) { return stats.scalar_type() == at::kDouble; }

template <size_t n>
std::array<Tensor, n> empty_scalars(const Tensor& like, ScalarType type) {
  std::array<Tensor, n> scalars;
  for (Tensor& scalar : scalars) scalar = empty(like, {}, type);
  return scalars;
}

inline GeneratorOutputs allocate_generator(const Tensor& teacher_logits) {
  const ScalarType type = stats_dtype(teacher_logits);
  return {empty_scalars<kGeneratorLosses>(teacher_logits, type),
          empty(teacher_logits, {3, teacher_logits.sym_size(0)}, type),
          empty(teacher_logits, {teacher_logits.sym_size(1)}, type)};
}

inline GeneratorGradients allocate_generator_grads(const Tensor& teacher_logits,
                                                   const std::optional<Tensor>& features) {
  return {
      empty_grad(teacher_logits),
      features ? empty_grad(*features) : empty(teacher_logits, {0}, teacher_logits.scalar_type())};
}

inline DistillOutputs allocate_distill(const Tensor& student_logits, const Tensor& teacher_logits) {
  const ScalarType type = stats_dtype(student_logits, teacher_logits);
  return {empty_scalars<kDistillLosses>(student_logits, type),
          empty(student_logits, {4, student_logits.sym_size(0)}, type)};
}

inline JointOutputs allocate_joint(const Tensor& teacher_logits,
                                   const std::optional<Tensor>& features,
                                   const Tensor& student_logits) {
  return {allocate_generator(teacher_logits).losses,
          allocate_distill(student_logits, teacher_logits).losses,
          allocate_generator_grads(teacher_logits, features), empty_grad(student_logits)};
}

// ---- Both losses from the four operators of one device -----------------------------------------

inline JointOutputs compose_joint(const DeviceLosses& device, const Tensor& teacher_logits,
                                  const std::optional<Tensor>& features,
                                  const Tensor& student_logits, const GeneratorWeights& weights,
                                  double temperature, bool scale_by_t2) {
  const GeneratorOutputs g = device.generator(teacher_logits, features, weights);
  const DistillOutputs d = device.distill(student_logits, teacher_logits, temperature, scale_by_t2);
  const Tensor one = at::ones({}, g.losses[0].options());
  return {
      g.losses, d.losses,
      device.generator_backward(one, teacher_logits, features, g.row_stats, g.class_mean, weights),
      device.distill_backward(one, student_logits, teacher_logits, d.row_stats, temperature,
                              scale_by_t2)};
}

}  // namespace dafl
