// The Python module dafl_fast._C and the registration of the operators.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <vector>

#include "cpu/kernels.h"
#include "cuda/plan.h"
#include "layers.h"
#include "losses.h"

#define DAFL_STRING_(x) #x
#define DAFL_STRING(x) DAFL_STRING_(x)

namespace dafl {
namespace {

#ifndef DAFL_FAST_CUDA
// Where an operator that meets CUDA tensors ends in a build without kernels for them.
void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              " has no CUDA kernels in this build of dafl_fast: move its tensors "
                              "to the CPU, or use dafl_fast.reference");
}
#endif

// What the CUDA launch planner decides; in every build, for the tests.
py::dict plan(int64_t rows, int64_t classes, bool float64, int multiprocessors, int capability) {
  TORCH_CHECK_VALUE(rows >= 1 && classes >= 1 && multiprocessors >= 1,
                    "plan needs rows, classes and multiprocessors of at least 1");
  const cuda::Plan plan = cuda::make_plan(rows, classes, float64, {multiprocessors, capability});
  const char* names[] = {"tile", "warp", "block", "cluster", "stream"};
  py::dict result;
  result["regime"] = names[static_cast<int>(plan.regime)];
  result["threads"] = plan.threads;
  result["quads"] = plan.quads;
  result["cluster"] = plan.cluster;
  result["one_launch"] = plan.one_launch;
  result["parts"] = plan.parts;
  result["rows"] = plan.rows;
  result["blocks"] = plan.blocks;
  result["shared"] = plan.shared;
  result["scratch"] = plan.scratch;
  return result;
}

py::dict build_info() {
  py::dict info;
  info["version"] = DAFL_STRING(DAFL_FAST_VERSION);
  info["torch"] = TORCH_VERSION;
#ifdef DAFL_FAST_CUDA
  info["cuda"] = true;
  info["cuda_toolkit"] = DAFL_STRING(DAFL_FAST_CUDA_TOOLKIT);
  info["cuda_archs"] = DAFL_STRING(DAFL_FAST_CUDA_ARCHS);
#else
  info["cuda"] = false;
#endif
  info["isa"] = cpu::isa();
  std::vector<std::string> available;
  for (const char* const* name = cpu::isa_available(); *name != nullptr; ++name) {
    available.emplace_back(*name);
  }
  info["isa_available"] = available;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY(dafl_fast, m) {
  m.def(
      "generator_loss(Tensor teacher_logits, Tensor? features, float one_hot, float entropy, "
      "float activation, float log_base) -> (Tensor total, Tensor one_hot_part, "
      "Tensor entropy_part, Tensor activation_part, Tensor row_stats, Tensor class_mean)");
  m.def(
      "generator_loss_backward(Tensor grad_total, Tensor teacher_logits, Tensor? features, "
      "Tensor row_stats, Tensor class_mean, float one_hot, float entropy, float activation, "
      "float log_base) -> (Tensor grad_logits, Tensor grad_features)");
  m.def(
      "distill_loss(Tensor student_logits, Tensor teacher_logits, float temperature, "
      "bool scale_by_t2) -> (Tensor total, Tensor kl, Tensor agreement, Tensor row_stats)");
  m.def(
      "distill_loss_backward(Tensor grad_total, Tensor student_logits, Tensor teacher_logits, "
      "Tensor row_stats, float temperature, bool scale_by_t2) -> Tensor grad_student");
  m.def(
      "dafl_losses(Tensor teacher_logits, Tensor? features, Tensor student_logits, float one_hot, "
      "float entropy, float activation, float log_base, float temperature, bool scale_by_t2) -> "
      "(Tensor generator_total, Tensor one_hot_part, Tensor entropy_part, Tensor activation_part, "
      "Tensor distill_total, Tensor kl, Tensor agreement, Tensor grad_teacher, "
      "Tensor grad_features, Tensor grad_student)");

  // The layers, for CPU tensors: their files register the kernels.
  m.def("upsample_conv(Tensor x, Tensor weight) -> (Tensor y, Tensor mean, Tensor variance)");
  m.def("upsample_conv_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)");
  m.def("moments(Tensor x) -> (Tensor mean, Tensor variance)");
  m.def(
      "norm_activation(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, "
      "float eps, float slope) -> Tensor");
  m.def(
      "norm_activation_backward(Tensor grad, Tensor x, Tensor mean, Tensor variance, "
      "Tensor weight, Tensor bias, float eps, float slope) -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_image_conv(Tensor x, Tensor mean, Tensor variance, Tensor norm_weight, "
      "Tensor norm_bias, float eps, float slope, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "norm_image_conv_backward(Tensor grad, Tensor x, Tensor mean, Tensor variance, "
      "Tensor norm_weight, Tensor norm_bias, float eps, float slope, Tensor weight, "
      "Tensor bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("conv_pool(Tensor x, Tensor weight, Tensor bias) -> (Tensor y, Tensor index)");
  m.def(
      "conv_pool_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor index, "
      "bool want_input, bool want_weight) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? forward_factors, "
      "Tensor? backward_factors) -> Tensor");
  m.def(
      "conv3x3_factors(Tensor weight, ScalarType dtype, bool backward) -> "
      "(Tensor forward_factors, Tensor backward_factors)");
  m.def("conv3x3_outputs(Tensor x, Tensor factors, Tensor? bias, SymInt channels) -> Tensor");
  m.def("conv3x3_weight_grad(Tensor grad, Tensor x, Tensor weight) -> Tensor");
}

TORCH_LIBRARY_IMPL(dafl_fast, Autograd, m) {
  m.impl("generator_loss", generator_loss_autograd);
  m.impl("distill_loss", distill_loss_autograd);
  m.impl("generator_loss_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("distill_loss_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("dafl_losses", torch::autograd::autogradNotImplementedFallback());
  for (const char* name :
       {"upsample_conv_backward", "moments", "norm_activation_backward", "norm_image_conv_backward",
        "conv_pool_backward", "conv3x3_factors", "conv3x3_outputs", "conv3x3_weight_grad"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(dafl_fast, CPU, m) {
  m.impl("generator_loss", generator_loss_cpu);
  m.impl("distill_loss", distill_loss_cpu);
  m.impl("generator_loss_backward", generator_loss_backward_cpu);
  m.impl("distill_loss_backward", distill_loss_backward_cpu);
  m.impl("dafl_losses", dafl_losses_cpu);
}

TORCH_LIBRARY_IMPL(dafl_fast, CUDA, m) {
#ifdef DAFL_FAST_CUDA
  m.impl("generator_loss", generator_loss_cuda);
  m.impl("distill_loss", distill_loss_cuda);
  m.impl("generator_loss_backward", generator_loss_backward_cuda);
  m.impl("distill_loss_backward", distill_loss_backward_cuda);
  m.impl("dafl_losses", dafl_losses_cuda);
#else
  for (const char* name : {"generator_loss", "distill_loss", "generator_loss_backward",
                           "distill_loss_backward", "dafl_losses"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
#endif
}

TORCH_LIBRARY_IMPL(dafl_fast, Meta, m) {
  m.impl("generator_loss", generator_loss_meta);
  m.impl("distill_loss", distill_loss_meta);
  m.impl("generator_loss_backward", generator_loss_backward_meta);
  m.impl("distill_loss_backward", distill_loss_backward_meta);
  m.impl("dafl_losses", dafl_losses_meta);
}

// The bound functions are the operators without the cost of torch.ops' argument parsing. They
// return what the public functions return: the saved statistics stay in C++.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "generator_loss",
      [](const Tensor& teacher_logits, const std::optional<Tensor>& features, double one_hot,
         double entropy, double activation, double log_base) {
        auto [total, one_hot_part, entropy_part, activation_part, row_stats, class_mean] =
            generator_loss(teacher_logits, features, one_hot, entropy, activation, log_base);
        return std::make_tuple(total, one_hot_part, entropy_part, activation_part);
      },
      release());
  m.def(
      "distill_loss",
      [](const Tensor& student_logits, const Tensor& teacher_logits, double temperature,
         bool scale_by_t2) {
        auto [total, kl, agreement, row_stats] =
            distill_loss(student_logits, teacher_logits, temperature, scale_by_t2);
        return std::make_tuple(total, kl, agreement);
      },
      release());
  m.def("dafl_losses", dafl_losses, release());
  m.def("plan", plan, py::arg("rows"), py::arg("classes"), py::arg("float64"),
        py::arg("multiprocessors"), py::arg("capability"));
  m.def("conv3x3_pays", [](const py::object& dtype) {
    return conv3x3_pays(torch::python::detail::py_object_to_dtype(dtype));
  });
  m.def("build_info", build_info);
}

}  // namespace dafl
