// The fused losses on the CPU, their dispatch and differentiation.
#include "losses.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "losses_shared.h"

namespace dafl {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- CPU ---------------------------------------------------------------------------------------

void set(const Tensor& scalar, double value) {
  if (is_f64(scalar)) {
    *scalar.mutable_data_ptr<double>() = value;
  } else {
    *scalar.mutable_data_ptr<float>() = static_cast<float>(value);
  }
}

// Rows are cut by shape alone, never by the number of threads: about 32K elements a chunk, so that
// small batches stay on one thread, and at most 64 chunks, so that partial sums stay few. Whole
// multiples of the widest vector.
struct Chunks {
  int64_t N, rows, count;

  Chunks(int64_t N, int64_t width) : N(N) {
    int64_t wanted = std::max(32768 / std::max<int64_t>(width, 1), (N + 63) / 64);
    rows = std::max<int64_t>(wanted + 15, 16) / 16 * 16;
    count = (N + rows - 1) / rows;
  }

  // body(chunk, begin, end, scratch)
  template <class Body>
  void run(int64_t scratch_values, Body body) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      std::unique_ptr<double[]> scratch(scratch_values > 0 ? new double[scratch_values] : nullptr);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        body(chunk, chunk * rows, std::min(N, (chunk + 1) * rows), scratch.get());
      }
    });
  }

  // Adds the chunks' sums into the first one's, in order.
  void reduce(std::vector<double>& sums, int64_t width) const {
    for (int64_t chunk = 1; chunk < count; ++chunk) {
      const double* from = sums.data() + chunk * width;
      for (int64_t k = 0; k < width; ++k) sums[k] += from[k];
    }
  }
};

double log_or_zero(double p) { return p == 0 ? 0 : std::log(p); }

template <class S>
void write_class_mean(const Tensor& class_mean, const std::vector<double>& sums, int64_t N) {
  S* mean = class_mean.mutable_data_ptr<S>();
  for (int64_t k = 0; k < class_mean.size(0); ++k) mean[k] = static_cast<S>(sums[k] / N);
}

// What row_math.h calls slope_k. Subtracting L_ie (sum p_bar log p_bar) from every log p_bar_k
// changes no gradient, since a row's p sum to 1, and spares fp32 a cancellation.
template <class S>
std::vector<S> entropy_slope(const Tensor& class_mean, double factor) {
  const S* mean = class_mean.const_data_ptr<S>();
  int64_t C = class_mean.size(0);
  std::vector<double> logs(C);
  double centre = 0;
  for (int64_t k = 0; k < C; ++k) {
    logs[k] = log_or_zero(mean[k]);
    centre += mean[k] * logs[k];
  }
  std::vector<S> slope(C);
  for (int64_t k = 0; k < C; ++k) slope[k] = static_cast<S>(factor * (logs[k] - centre));
  return slope;
}

}  // namespace

GeneratorOutputs generator_loss_cpu(const Tensor& teacher_logits,
                                    const std::optional<Tensor>& features, double one_hot,
                                    double entropy, double activation, double log_base) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  GeneratorOutputs outputs = allocate_generator(teacher_logits);
  auto& [total, one_hot_part, entropy_part, activation_part, row_stats, class_mean] = outputs;

  int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  int64_t F = features ? features->size(1) : 0;
  Chunks chunks(N, C + F);
  int64_t width = C + 2;  // sums of p, of the one-hot loss, of |f|
  std::vector<double> sums(std::max<int64_t>(chunks.count, 1) * width);
  const cpu::Kernels& kernels = cpu::kernels(is_f64(row_stats));
  const cpu::Kernels& feature_kernels = cpu::kernels(features && is_f64(*features));
  cpu::GeneratorForward args{N, C, matrix(teacher_logits), row_stats.mutable_data_ptr()};

  chunks.run(cpu::scratch_size(C), [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    double* out = sums.data() + chunk * width;
    kernels.generator_forward(args, begin, end, out, scratch);
    if (F > 0) out[C + 1] = feature_kernels.abs_sum(matrix(*features), F, begin, end);
  });
  chunks.reduce(sums, width);

  int64_t rows = std::max<int64_t>(N, 1);  // the sums of no rows are 0
  double L_oh = sums[C] / rows, L_ie = 0, L_a = F > 0 ? -sums[C + 1] / rows / F : 0;
  for (int64_t k = 0; k < C; ++k) L_ie += sums[k] / rows * log_or_zero(sums[k] / rows);
  L_ie /= std::log(log_base);
  if (is_f64(class_mean)) {
    write_class_mean<double>(class_mean, sums, rows);
  } else {
    write_class_mean<float>(class_mean, sums, rows);
  }
  set(total, one_hot * L_oh + entropy * L_ie + activation * L_a);
  set(one_hot_part, L_oh);
  set(entropy_part, L_ie);
  set(activation_part, L_a);
  return outputs;
}

GeneratorGradients generator_loss_backward_cpu(const Tensor& grad_total,
                                               const Tensor& teacher_logits,
                                               const std::optional<Tensor>& features,
                                               const Tensor& row_stats, const Tensor& class_mean,
                                               double one_hot, double entropy, double activation,
                                               double log_base) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  GeneratorGradients grads = allocate_generator_grads(teacher_logits, features);
  auto& [grad_logits, grad_features] = grads;

  int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  int64_t F = features ? features->size(1) : 0;
  if (N == 0) return grads;
  double upstream = grad_total.item<double>() / N;
  double slope_factor = upstream * entropy / std::log(log_base);
  bool f64 = is_f64(row_stats);
  std::vector<double> slope64;
  std::vector<float> slope32;
  if (f64) {
    slope64 = entropy_slope<double>(class_mean, slope_factor);
  } else {
    slope32 = entropy_slope<float>(class_mean, slope_factor);
  }
  const cpu::Kernels& kernels = cpu::kernels(f64);
  const cpu::Kernels& feature_kernels = cpu::kernels(features && is_f64(*features));
  cpu::GeneratorBackward args{N,
                              C,
                              matrix(teacher_logits),
                              row_stats.const_data_ptr(),
                              f64 ? static_cast<const void*>(slope64.data()) : slope32.data(),
                              upstream * one_hot,
                              grad_logits.mutable_data_ptr()};

  Chunks(N, C + F).run(cpu::scratch_size(C), [&](int64_t, int64_t begin, int64_t end,
                                                 void* scratch) {
    kernels.generator_backward(args, begin, end, scratch);
    if (F > 0) {
      feature_kernels.sign_gradient(matrix(*features), F, begin, end, -upstream * activation / F,
                                    grad_features.mutable_data_ptr());
    }
  });
  return grads;
}

DistillOutputs distill_loss_cpu(const Tensor& student_logits, const Tensor& teacher_logits,
                                double temperature, bool scale_by_t2) {
  check_distill(student_logits, teacher_logits, temperature);
  DistillOutputs outputs = allocate_distill(student_logits, teacher_logits);
  auto& [total, kl, agreement, row_stats] = outputs;

  int64_t N = student_logits.size(0), C = student_logits.size(1);
  Chunks chunks(N, C);
  std::vector<double> sums(std::max<int64_t>(chunks.count, 1) * 2);  // of KL, of agreeing rows
  const cpu::Kernels& kernels = cpu::kernels(is_f64(row_stats));
  cpu::DistillForward args{N,
                           C,
                           matrix(student_logits),
                           matrix(teacher_logits),
                           1 / temperature,
                           row_stats.mutable_data_ptr()};

  chunks.run(cpu::scratch_size(C), [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    kernels.distill_forward(args, begin, end, sums.data() + chunk * 2, scratch);
  });
  chunks.reduce(sums, 2);

  int64_t rows = std::max<int64_t>(N, 1);
  set(total, sums[0] / rows * (scale_by_t2 ? temperature * temperature : 1));
  set(kl, sums[0] / rows);
  set(agreement, sums[1] / rows);
  return outputs;
}

Tensor distill_loss_backward_cpu(const Tensor& grad_total, const Tensor& student_logits,
                                 const Tensor& teacher_logits, const Tensor& row_stats,
                                 double temperature, bool scale_by_t2) {
  check_distill(student_logits, teacher_logits, temperature);
  Tensor grad = empty_grad(student_logits);
  int64_t N = student_logits.size(0), C = student_logits.size(1);
  if (N == 0) return grad;
  const cpu::Kernels& kernels = cpu::kernels(is_f64(row_stats));
  cpu::DistillBackward args{
      N,
      C,
      matrix(student_logits),
      matrix(teacher_logits),
      1 / temperature,
      row_stats.const_data_ptr(),
      grad_total.item<double>() / N * (scale_by_t2 ? temperature : 1 / temperature),
      grad.mutable_data_ptr()};
  Chunks(N, C).run(cpu::scratch_size(C), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    kernels.distill_backward(args, begin, end, scratch);
  });
  return grad;
}

JointOutputs dafl_losses_cpu(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                             const Tensor& student_logits, double one_hot, double entropy,
                             double activation, double log_base, double temperature,
                             bool scale_by_t2) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  check_distill(student_logits, teacher_logits, temperature);
  return compose_joint<generator_loss_cpu, generator_loss_backward_cpu, distill_loss_cpu,
                       distill_loss_backward_cpu>(teacher_logits, features, student_logits, one_hot,
                                                  entropy, activation, log_base, temperature,
                                                  scale_by_t2);
}

// ---- Meta --------------------------------------------------------------------------------------

GeneratorOutputs generator_loss_meta(const Tensor& teacher_logits,
                                     const std::optional<Tensor>& features, double one_hot,
                                     double entropy, double activation, double log_base) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  return allocate_generator(teacher_logits);
}

GeneratorGradients generator_loss_backward_meta(const Tensor&, const Tensor& teacher_logits,
                                                const std::optional<Tensor>& features,
                                                const Tensor&, const Tensor&, double, double,
                                                double, double) {
  return allocate_generator_grads(teacher_logits, features);
}

DistillOutputs distill_loss_meta(const Tensor& student_logits, const Tensor& teacher_logits,
                                 double temperature, bool) {
  check_distill(student_logits, teacher_logits, temperature);
  return allocate_distill(student_logits, teacher_logits);
}

Tensor distill_loss_backward_meta(const Tensor&, const Tensor& student_logits, const Tensor&,
                                  const Tensor&, double, bool) {
  return empty_grad(student_logits);
}

JointOutputs dafl_losses_meta(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                              const Tensor& student_logits, double one_hot, double entropy,
                              double activation, double log_base, double temperature, bool) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  check_distill(student_logits, teacher_logits, temperature);
  auto [total, one_hot_part, entropy_part, activation_part, row_stats, class_mean] =
      allocate_generator(teacher_logits);
  auto [distill_total, kl, agreement, pair_stats] =
      allocate_distill(student_logits, teacher_logits);
  auto [grad_teacher, grad_features] = allocate_generator_grads(teacher_logits, features);
  return {total, one_hot_part, entropy_part, activation_part, distill_total,
          kl,    agreement,    grad_teacher, grad_features,   empty_grad(student_logits)};
}

// ---- Through the dispatcher --------------------------------------------------------------------

namespace {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

GeneratorOutputs generator_loss(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                                double one_hot, double entropy, double activation,
                                double log_base) {
  static auto op = find<decltype(generator_loss)>("dafl_fast::generator_loss");
  return op.call(teacher_logits, features, one_hot, entropy, activation, log_base);
}

GeneratorGradients generator_loss_backward(const Tensor& grad_total, const Tensor& teacher_logits,
                                           const std::optional<Tensor>& features,
                                           const Tensor& row_stats, const Tensor& class_mean,
                                           double one_hot, double entropy, double activation,
                                           double log_base) {
  static auto op = find<decltype(generator_loss_backward)>("dafl_fast::generator_loss_backward");
  return op.call(grad_total, teacher_logits, features, row_stats, class_mean, one_hot, entropy,
                 activation, log_base);
}

DistillOutputs distill_loss(const Tensor& student_logits, const Tensor& teacher_logits,
                            double temperature, bool scale_by_t2) {
  static auto op = find<decltype(distill_loss)>("dafl_fast::distill_loss");
  return op.call(student_logits, teacher_logits, temperature, scale_by_t2);
}

Tensor distill_loss_backward(const Tensor& grad_total, const Tensor& student_logits,
                             const Tensor& teacher_logits, const Tensor& row_stats,
                             double temperature, bool scale_by_t2) {
  static auto op = find<decltype(distill_loss_backward)>("dafl_fast::distill_loss_backward");
  return op.call(grad_total, student_logits, teacher_logits, row_stats, temperature, scale_by_t2);
}

JointOutputs dafl_losses(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                         const Tensor& student_logits, double one_hot, double entropy,
                         double activation, double log_base, double temperature, bool scale_by_t2) {
  static auto op = find<decltype(dafl_losses)>("dafl_fast::dafl_losses");
  return op.call(teacher_logits, features, student_logits, one_hot, entropy, activation, log_base,
                 temperature, scale_by_t2);
}

// ---- Autograd ----------------------------------------------------------------------------------
// Only `total` is differentiable. The backward operators refuse to be differentiated again.

namespace {

// Around the backward operators: their Autograd kernel, which refuses, is needed (and worth its
// time) only where somebody builds a graph of the backward pass.
struct SkipAutograd {
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;
  SkipAutograd() {
    if (!at::GradMode::is_enabled()) below.emplace();
  }
};

// Nodes of the autograd graph, written out because torch::autograd::Function costs as much as the
// kernels at the method's own sizes (1024 x 10).
struct GeneratorLossNode : Node {
  SavedVariable teacher_logits, features, row_stats, class_mean;
  double one_hot, entropy, activation, log_base;

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    SkipAutograd skip;
    Tensor f = features.unpack();
    auto [grad_logits, grad_features] = generator_loss_backward(
        grads[0], teacher_logits.unpack(), f.defined() ? std::make_optional(f) : std::nullopt,
        row_stats.unpack(), class_mean.unpack(), one_hot, entropy, activation, log_base);
    return {grad_logits, f.defined() ? grad_features : Tensor()};
  }

  void release_variables() override {
    for (SavedVariable* saved : {&teacher_logits, &features, &row_stats, &class_mean}) {
      saved->reset_data();
    }
  }

  std::string name() const override { return "GeneratorLossBackward"; }
};

struct DistillLossNode : Node {
  SavedVariable student_logits, teacher_logits, row_stats;
  double temperature;
  bool scale_by_t2;

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor()};
    SkipAutograd skip;
    return {distill_loss_backward(grads[0], student_logits.unpack(), teacher_logits.unpack(),
                                  row_stats.unpack(), temperature, scale_by_t2)};
  }

  void release_variables() override {
    for (SavedVariable* saved : {&student_logits, &teacher_logits, &row_stats}) {
      saved->reset_data();
    }
  }

  std::string name() const override { return "DistillLossBackward"; }
};

// How this torch holds a node: by std::shared_ptr, or in newer ones by c10::intrusive_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);

// A node that returns the gradients of `inputs`.
template <class T>
auto make_node(torch::autograd::edge_list&& inputs) {
  auto node = [] {
    if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) {
      return std::make_shared<T>();
    } else {
      return c10::make_intrusive<T>();
    }
  }();
  node->set_next_edges(std::move(inputs));
  return node;
}

}  // namespace

GeneratorOutputs generator_loss_autograd(const Tensor& teacher_logits,
                                         const std::optional<Tensor>& features, double one_hot,
                                         double entropy, double activation, double log_base) {
  GeneratorOutputs out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return generator_loss(teacher_logits, features, one_hot, entropy, activation, log_base);
  }();
  Tensor f = features.value_or(Tensor());
  if (torch::autograd::compute_requires_grad(teacher_logits, f)) {
    auto node =
        make_node<GeneratorLossNode>(torch::autograd::collect_next_edges(teacher_logits, f));
    node->teacher_logits = SavedVariable(teacher_logits, false);
    node->features = SavedVariable(f, false);
    node->row_stats = SavedVariable(std::get<4>(out), false);
    node->class_mean = SavedVariable(std::get<5>(out), false);
    node->one_hot = one_hot;
    node->entropy = entropy;
    node->activation = activation;
    node->log_base = log_base;
    torch::autograd::set_history(std::get<0>(out), node);
  }
  return out;
}

DistillOutputs distill_loss_autograd(const Tensor& student_logits, const Tensor& teacher_logits,
                                     double temperature, bool scale_by_t2) {
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && teacher_logits.requires_grad()),
                    "teacher_logits must not require grad, since distill_loss has a gradient for "
                    "student_logits only: pass teacher_logits.detach()");
  DistillOutputs out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return distill_loss(student_logits, teacher_logits, temperature, scale_by_t2);
  }();
  if (torch::autograd::compute_requires_grad(student_logits)) {
    auto node = make_node<DistillLossNode>(torch::autograd::collect_next_edges(student_logits));
    node->student_logits = SavedVariable(student_logits, false);
    node->teacher_logits = SavedVariable(teacher_logits, false);
    node->row_stats = SavedVariable(std::get<3>(out), false);
    node->temperature = temperature;
    node->scale_by_t2 = scale_by_t2;
    torch::autograd::set_history(std::get<0>(out), node);
  }
  return out;
}

}  // namespace dafl
