// The Python module dafl_fast._C. The operators register themselves, each in its own file.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <vector>

#include "cpu/instruction_set.h"
#include "cuda/plan.h"
#include "layers/layers.h"
#include "losses/losses.h"

#define DAFL_STRING_(x) #x
#define DAFL_STRING(x) DAFL_STRING_(x)

namespace dafl {
namespace {

template <class Tuple, size_t... I>
auto first(Tuple&& all, std::index_sequence<I...>) {
  return std::make_tuple(std::move(std::get<I>(all))...);
}

// The first n of a tuple.
template <size_t n, class Tuple>
auto first(Tuple&& all) {
  return first(all, std::make_index_sequence<n>());
}

// What the CUDA launch planner decides; in every build, for the tests.
py::dict plan(int64_t rows, int64_t classes, bool float64, int multiprocessors, int capability) {
  TORCH_CHECK_VALUE(rows >= 1 && classes >= 1 && multiprocessors >= 1,
                    "plan needs rows, classes and multiprocessors of at least 1");
  const cuda::Plan plan = cuda::make_plan(rows, classes, float64, {multiprocessors, capability});
  const char* names[] = {"tile", "warp", "block", "cluster", "stream"};
  py::dict result;
  result["regime"] = names[static_cast<int>(plan.regime)];
  result["threads"] = plan.threads;
  result["group"] = plan.group;
  result["cluster"] = plan.cluster;
  result["one_launch"] = plan.one_launch;
  result["parts"] = plan.parts;
  result["rows"] = plan.rows;
  result["blocks"] = plan.blocks;
  result["backward_blocks"] = plan.backward_blocks;
  result["shared"] = plan.shared;
  result["scratch"] = plan.scratch;
  result["scalars"] = cuda::kPartScalars;
  return result;
}

#ifdef DAFL_FAST_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = DAFL_STRING(DAFL_FAST_VERSION);
  info["torch"] = TORCH_VERSION;
  info["cuda"] = kCuda;
#ifdef DAFL_FAST_CUDA
  info["cuda_toolkit"] = DAFL_STRING(DAFL_FAST_CUDA_TOOLKIT);
  info["cuda_archs"] = DAFL_STRING(DAFL_FAST_CUDA_ARCHS);
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

// The operators without the cost of torch.ops' argument parsing. They return what the public
// functions return: the saved statistics stay in C++.
template <size_t... I>
void bind_losses(py::module_& m, std::index_sequence<I...>) {
  using release = py::call_guard<py::gil_scoped_release>;
  using Features = std::optional<Tensor>;
  m.def(
      "generator_loss",
      [](const Tensor& teacher_logits, const Features& features, Weight<I>... weights) {
        return first<kGeneratorLosses>(generator_loss(teacher_logits, features, {weights...}));
      },
      release());
  m.def(
      "distill_loss",
      [](const Tensor& student_logits, const Tensor& teacher_logits, double temperature,
         bool scale_by_t2) {
        return first<kDistillLosses>(
            distill_loss(student_logits, teacher_logits, temperature, scale_by_t2));
      },
      release());
  m.def(
      "dafl_losses",
      [](const Tensor& teacher_logits, const Features& features, const Tensor& student_logits,
         Weight<I>... weights, double temperature, bool scale_by_t2) {
        return dafl_losses(teacher_logits, features, student_logits, {weights...}, temperature,
                           scale_by_t2);
      },
      release());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  bind_losses(m, WeightIndices());
  m.def("plan", plan, py::arg("rows"), py::arg("classes"), py::arg("float64"),
        py::arg("multiprocessors"), py::arg("capability"));
  m.def("conv3x3_pays", [](at::ScalarType dtype) { return conv3x3_pays(dtype); });
  m.def("build_info", build_info);
  m.attr("cuda") = kCuda;
}

}  // namespace dafl
