// How operators are registered and called. Every operator is defined, schema and kernels at once,
// in a TORCH_LIBRARY_FRAGMENT of the file that implements it; there is no list of them elsewhere.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <string>
#include <utility>

namespace dafl {

template <class Kernel>
void add_kernel(torch::Library& library, const std::string& schema, c10::DispatchKey key,
                Kernel&& kernel) {
  const std::string name = schema.substr(0, schema.find('('));
  library.impl(name.c_str(), torch::dispatch(key, std::forward<Kernel>(kernel)));
}

// The kernel for tensors that no other is for. It names the first that is not dense.
inline void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto given = torch::jit::last(*stack, arguments.size());
  std::string device;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!given[i].isTensor()) continue;
    const at::Tensor& tensor = given[i].toTensor();
    const char* kind = !tensor.defined()                 ? "none"
                       : tensor.is_nested()              ? "a nested one"
                       : tensor.is_quantized()           ? "a quantised one"
                       : tensor.layout() == at::kMkldnn  ? "one in oneDNN's layout"
                       : tensor.layout() != at::kStrided ? "a sparse one"
                                                         : nullptr;
    TORCH_CHECK_TYPE(kind == nullptr, op.schema().name(), "'s ", arguments[i].name(),
                     " must be a dense tensor, got ", kind);
    device = c10::str(tensor.device().type());
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), " has no kernels for ", device,
                              " in this build of dafl_fast: move its tensors to the CPU");
}

// An operator, its kernel for CPU tensors and the one that only allocates its results (for fake
// tensors and torch.compile). Without an Autograd kernel it refuses to be differentiated.
template <class Cpu, class Meta>
void define(torch::Library& library, const std::string& schema, Cpu cpu, Meta meta,
            torch::CppFunction autograd = torch::autograd::autogradNotImplementedFallback()) {
  library.def(schema.c_str());
  add_kernel(library, schema, c10::DispatchKey::CPU, cpu);
  add_kernel(library, schema, c10::DispatchKey::Meta, meta);
  add_kernel(library, schema, c10::DispatchKey::Autograd, std::move(autograd));
  for (auto others : {c10::DispatchKey::CompositeExplicitAutograd,  // that is, all other backends
                      c10::DispatchKey::AutogradNestedTensor}) {
    add_kernel(library, schema, others, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

// Whether forward-mode differentiation follows one of these tensors.
template <class... Tensors>
bool have_tangents(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

// Autograd kernels call this first: without it a result would be without its tangent.
template <class... Tensors>
void refuse_tangents(const char* name, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !have_tangents(tensors...), name,
      " has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): use "
      "reverse mode, or the same in plain PyTorch");
}

// And this one for an argument that has no gradient, which would otherwise be missing.
inline void refuse_gradient(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && tensor.defined() && tensor.requires_grad()),
                    name, " must not require grad, since it has no gradient: detach it");
}

// For calls through the dispatcher. Kept in a static variable, it is looked up once.
template <class Signature>
auto find_operator(const char* name) {
  const std::string full = std::string("dafl_fast::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").typed<Signature>();
}

}  // namespace dafl
