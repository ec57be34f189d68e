// The fused losses as operators: schemas, registration for every device, calls through the
// dispatcher, differentiation. The weights of the generator's loss are arguments of their own in
// the schemas and one struct everywhere else; generator_terms.h alone names them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "operator.h"
#include "shared.h"

namespace dafl {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- From structs to the schemas' arguments and results, and back ------------------------------

GeneratorTuple as_tuple(GeneratorOutputs&& out) {
  return std::tuple_cat(std::move(out.losses),
                        std::forward_as_tuple(std::move(out.row_stats), std::move(out.class_mean)));
}

DistillTuple as_tuple(DistillOutputs&& out) {
  return std::tuple_cat(std::move(out.losses), std::forward_as_tuple(std::move(out.row_stats)));
}

JointTuple as_tuple(JointOutputs&& out) {
  return std::tuple_cat(
      std::move(out.generator), std::move(out.distill),
      std::forward_as_tuple(std::move(out.teacher.logits), std::move(out.teacher.features),
                            std::move(out.grad_student)));
}

// The operators' signatures, with a double for each weight, for kernels and for calls.
template <size_t... I>
struct Operators {
  using Features = const std::optional<Tensor>&;

  template <const DeviceLosses& device>
  static GeneratorTuple generator(const Tensor& teacher_logits, Features features,
                                  Weight<I>... weights) {
    return as_tuple(device.generator(teacher_logits, features, {weights...}));
  }

  template <const DeviceLosses& device>
  static std::tuple<Tensor, Tensor> generator_backward(const Tensor& grad_total,
                                                       const Tensor& teacher_logits,
                                                       Features features, const Tensor& row_stats,
                                                       const Tensor& class_mean,
                                                       Weight<I>... weights) {
    auto [logits, f] = device.generator_backward(grad_total, teacher_logits, features, row_stats,
                                                 class_mean, {weights...});
    return {std::move(logits), std::move(f)};
  }

  template <const DeviceLosses& device>
  static DistillTuple distill(const Tensor& student_logits, const Tensor& teacher_logits,
                              double temperature, bool scale_by_t2) {
    return as_tuple(device.distill(student_logits, teacher_logits, temperature, scale_by_t2));
  }

  template <const DeviceLosses& device>
  static Tensor distill_backward(const Tensor& grad_total, const Tensor& student_logits,
                                 const Tensor& teacher_logits, const Tensor& row_stats,
                                 double temperature, bool scale_by_t2) {
    return device.distill_backward(grad_total, student_logits, teacher_logits, row_stats,
                                   temperature, scale_by_t2);
  }

  template <const DeviceLosses& device>
  static JointTuple joint(const Tensor& teacher_logits, Features features,
                          const Tensor& student_logits, Weight<I>... weights, double temperature,
                          bool scale_by_t2) {
    return as_tuple(device.joint(teacher_logits, features, student_logits, {weights...},
                                 temperature, scale_by_t2));
  }

  static GeneratorTuple generator_autograd(const Tensor& teacher_logits, Features features,
                                           Weight<I>... weights);

  // Calls operator `name`, which has the signature of a kernel above, with the arguments that come
  // before and after its weights.
  template <auto signature, class Before, class... Behind>
  static auto call(const char* name, const Before& before, const GeneratorWeights& weights,
                   Behind... behind) {
    static const auto op = find_operator<std::remove_pointer_t<decltype(signature)>>(name);
    const auto values = c10::bit_cast<std::array<double, sizeof...(I)>>(weights);
    return std::apply(
        [&](const auto&... arguments) { return op.call(arguments..., values[I]..., behind...); },
        before);
  }
};

template <size_t... I>
Operators<I...> operators_for(std::index_sequence<I...>);
using Ops = decltype(operators_for(WeightIndices()));

}  // namespace

GeneratorTuple generator_loss(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                              const GeneratorWeights& weights) {
  return Ops::call<&Ops::generator<cpu_losses>>("generator_loss",
                                                std::tie(teacher_logits, features), weights);
}

DistillTuple distill_loss(const Tensor& student_logits, const Tensor& teacher_logits,
                          double temperature, bool scale_by_t2) {
  static const auto op = find_operator<decltype(distill_loss)>("distill_loss");
  return op.call(student_logits, teacher_logits, temperature, scale_by_t2);
}

JointTuple dafl_losses(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                       const Tensor& student_logits, const GeneratorWeights& weights,
                       double temperature, bool scale_by_t2) {
  return Ops::call<&Ops::joint<cpu_losses>>("dafl_losses",
                                            std::tie(teacher_logits, features, student_logits),
                                            weights, temperature, scale_by_t2);
}

namespace {

// ---- Autograd ----------------------------------------------------------------------------------
// Only `total` is differentiable. The backward operators refuse to be differentiated again.

// Around the backward operators: their Autograd kernel, which refuses, is needed (and worth its
// time) only where somebody builds a graph of the backward pass, or follows tangents through it.
// Saved tensors must be unpacked before: activation checkpointing then computes the forward pass
// again, and that needs Autograd.
struct SkipAutograd {
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;

  template <class... Tensors>
  explicit SkipAutograd(const Tensors&... read) {
    if (!at::GradMode::is_enabled() && !have_tangents(read...)) below.emplace();
  }
};

// Nodes of the autograd graph, written out because torch::autograd::Function costs as much as the
// kernels at the method's own sizes (1024 x 10).
struct GeneratorLossNode : Node {
  SavedVariable teacher_logits, features, row_stats, class_mean;
  GeneratorWeights weights;

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    const Tensor t = teacher_logits.unpack(), f = features.unpack();
    const Tensor stats = row_stats.unpack(), mean = class_mean.unpack();
    const SkipAutograd skip(grads[0], t, f, stats, mean);
    auto [grad_logits, grad_features] = Ops::call<&Ops::generator_backward<cpu_losses>>(
        "generator_loss_backward",
        std::make_tuple(grads[0], t, f.defined() ? std::make_optional(f) : std::nullopt, stats,
                        mean),
        weights);
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
    const Tensor s = student_logits.unpack(), t = teacher_logits.unpack();
    const Tensor stats = row_stats.unpack();
    const SkipAutograd skip(grads[0], s, t, stats);
    using Signature = decltype(Ops::distill_backward<cpu_losses>);
    static const auto op = find_operator<Signature>("distill_loss_backward");
    return {op.call(grads[0], s, t, stats, temperature, scale_by_t2)};
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

template <size_t... I>
GeneratorTuple Operators<I...>::generator_autograd(const Tensor& teacher_logits, Features features,
                                                   Weight<I>... weights) {
  refuse_tangents("generator_loss", teacher_logits, features);
  GeneratorTuple out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return generator_loss(teacher_logits, features, {weights...});
  }();
  Tensor f = features.value_or(Tensor());
  if (torch::autograd::compute_requires_grad(teacher_logits, f)) {
    auto node =
        make_node<GeneratorLossNode>(torch::autograd::collect_next_edges(teacher_logits, f));
    node->teacher_logits = SavedVariable(teacher_logits, false);
    node->features = SavedVariable(f, false);
    node->row_stats = SavedVariable(std::get<kGeneratorLosses>(out), false);
    node->class_mean = SavedVariable(std::get<kGeneratorLosses + 1>(out), false);
    node->weights = {weights...};
    torch::autograd::set_history(std::get<0>(out), node);
  }
  return out;
}

DistillTuple distill_autograd(const Tensor& student_logits, const Tensor& teacher_logits,
                              double temperature, bool scale_by_t2) {
  refuse_tangents("distill_loss", student_logits, teacher_logits);
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && teacher_logits.requires_grad()),
                    "teacher_logits must not require grad, since distill_loss has a gradient for "
                    "student_logits only: pass teacher_logits.detach()");
  DistillTuple out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return distill_loss(student_logits, teacher_logits, temperature, scale_by_t2);
  }();
  if (torch::autograd::compute_requires_grad(student_logits)) {
    auto node = make_node<DistillLossNode>(torch::autograd::collect_next_edges(student_logits));
    node->student_logits = SavedVariable(student_logits, false);
    node->teacher_logits = SavedVariable(teacher_logits, false);
    node->row_stats = SavedVariable(std::get<kDistillLosses>(out), false);
    node->temperature = temperature;
    node->scale_by_t2 = scale_by_t2;
    torch::autograd::set_history(std::get<0>(out), node);
  }
  return out;
}

// ---- Shapes and dtypes only: fake tensors, torch.compile ---------------------------------------

const DeviceLosses meta_losses = {
    [](const Tensor& teacher_logits, const std::optional<Tensor>& features,
       const GeneratorWeights& weights) {
      check_generator(teacher_logits, features, weights);
      return allocate_generator(teacher_logits);
    },
    [](const Tensor& grad_total, const Tensor& teacher_logits,
       const std::optional<Tensor>& features, const Tensor& row_stats, const Tensor& class_mean,
       const GeneratorWeights& weights) {
      check_generator_backward(grad_total, teacher_logits, features, row_stats, class_mean,
                               weights);
      return allocate_generator_grads(teacher_logits, features);
    },
    [](const Tensor& student_logits, const Tensor& teacher_logits, double temperature, bool) {
      check_distill(student_logits, teacher_logits, temperature);
      return allocate_distill(student_logits, teacher_logits);
    },
    [](const Tensor& grad_total, const Tensor& student_logits, const Tensor& teacher_logits,
       const Tensor& row_stats, double temperature, bool) {
      check_distill_backward(grad_total, student_logits, teacher_logits, row_stats, temperature);
      return empty_grad(student_logits);
    },
    [](const Tensor& teacher_logits, const std::optional<Tensor>& features,
       const Tensor& student_logits, const GeneratorWeights& weights, double temperature, bool) {
      check_generator(teacher_logits, features, weights);
      check_distill(student_logits, teacher_logits, temperature);
      return allocate_joint(teacher_logits, features, student_logits);
    }};

// ---- Registration ------------------------------------------------------------------------------

// "type name suffix" of the first `count` weights' names, with commas.
std::string list(const char* type, const char* suffix, int count) {
  std::string all;
  for (int i = 0; i < count; ++i) {
    all += std::string(i == 0 ? "" : ", ") + type + " " + kGeneratorWeightNames[i] + suffix;
  }
  return all;
}

#ifdef DAFL_FAST_CUDA
#define DAFL_ON_CUDA(name) torch::CppFunction(&Ops::name<cuda_losses>)
#else
// The kernel for CUDA tensors in a build that has none.
void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              " has no CUDA kernels in this build of dafl_fast: move its tensors "
                              "to the CPU, or use dafl_fast.reference");
}
#define DAFL_ON_CUDA(name) torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>()
#endif

TORCH_LIBRARY_FRAGMENT(dafl_fast, m) {
  const std::string weights = list("float", "", kGeneratorWeights);
  const std::string losses = "Tensor total, " + list("Tensor", "_part", kGeneratorParts);
  const auto define_losses = [&](const std::string& schema, auto cpu, auto meta,
                                 torch::CppFunction cuda, auto... autograd) {
    define(m, schema, cpu, meta, torch::CppFunction(autograd)...);
    add_kernel(m, schema, c10::DispatchKey::CUDA, std::move(cuda));
  };

  define_losses("generator_loss(Tensor teacher_logits, Tensor? features, " + weights + ") -> (" +
                    losses + ", Tensor row_stats, Tensor class_mean)",
                &Ops::generator<cpu_losses>, &Ops::generator<meta_losses>, DAFL_ON_CUDA(generator),
                &Ops::generator_autograd);
  define_losses(
      "generator_loss_backward(Tensor grad_total, Tensor teacher_logits, Tensor? features, "
      "Tensor row_stats, Tensor class_mean, " +
          weights + ") -> (Tensor grad_logits, Tensor grad_features)",
      &Ops::generator_backward<cpu_losses>, &Ops::generator_backward<meta_losses>,
      DAFL_ON_CUDA(generator_backward));
  define_losses(
      "distill_loss(Tensor student_logits, Tensor teacher_logits, float temperature, "
      "bool scale_by_t2) -> (Tensor total, Tensor kl, Tensor agreement, Tensor row_stats)",
      &Ops::distill<cpu_losses>, &Ops::distill<meta_losses>, DAFL_ON_CUDA(distill),
      &distill_autograd);
  define_losses(
      "distill_loss_backward(Tensor grad_total, Tensor student_logits, Tensor teacher_logits, "
      "Tensor row_stats, float temperature, bool scale_by_t2) -> Tensor grad_student",
      &Ops::distill_backward<cpu_losses>, &Ops::distill_backward<meta_losses>,
      DAFL_ON_CUDA(distill_backward));
  define_losses("dafl_losses(Tensor teacher_logits, Tensor? features, Tensor student_logits, " +
                    weights +
                    ", float temperature, bool scale_by_t2) -> (Tensor generator_total, " +
                    list("Tensor", "_part", kGeneratorParts) +
                    ", Tensor distill_total, Tensor kl, Tensor agreement, Tensor grad_teacher, "
                    "Tensor grad_features, Tensor grad_student)",
                &Ops::joint<cpu_losses>, &Ops::joint<meta_losses>, DAFL_ON_CUDA(joint));
}

}  // namespace
}  // namespace dafl
