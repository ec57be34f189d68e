// Which kernels run: the widest that the processor has, or what DAFL_FAST_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "layer_kernels.h"
#include "winograd_kernels.h"

namespace dafl {
namespace cpu {

namespace baseline {
extern const Kernels f32_kernels, f64_kernels;
extern const LayerKernels f32_layers, bf16_layers, f16_layers, f64_layers;
extern const WinogradKernels f32_winograd, bf16_winograd, f16_winograd, f64_winograd;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels f32_kernels;
extern const LayerKernels f32_layers, bf16_layers, f16_layers;
extern const WinogradKernels f32_winograd, bf16_winograd, f16_winograd;
}  // namespace avx2
namespace avx512 {
extern const Kernels f32_kernels;
extern const LayerKernels f32_layers, bf16_layers, f16_layers;
extern const WinogradKernels f32_winograd, bf16_winograd, f16_winograd;
}  // namespace avx512
namespace avx512_bf16 {
extern const LayerKernels bf16_layers;
extern const WinogradKernels bf16_winograd;
}  // namespace avx512_bf16
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* f32;
  const LayerKernels* layers[3];  // f32, bf16, f16
  const WinogradKernels* winograd[3];
};

// Levels that can run here, narrowest first, and their number.
struct Available {
  Level levels[4];
  const char* names[5];
  int count = 0;

  void add(const Level& level) {
    levels[count] = level;
    names[count++] = level.name;
  }

  Available() : names{} {
    add({"baseline",
         &baseline::f32_kernels,
         {&baseline::f32_layers, &baseline::bf16_layers, &baseline::f16_layers},
         {&baseline::f32_winograd, &baseline::bf16_winograd, &baseline::f16_winograd}});
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      add({"avx2",
           &avx2::f32_kernels,
           {&avx2::f32_layers, &avx2::bf16_layers, &avx2::f16_layers},
           {&avx2::f32_winograd, &avx2::bf16_winograd, &avx2::f16_winograd}});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        add({"avx512",
             &avx512::f32_kernels,
             {&avx512::f32_layers, &avx512::bf16_layers, &avx512::f16_layers},
             {&avx512::f32_winograd, &avx512::bf16_winograd, &avx512::f16_winograd}});
        if (__builtin_cpu_supports("avx512bf16")) {
          add({"avx512_bf16",
               &avx512::f32_kernels,
               {&avx512::f32_layers, &avx512_bf16::bf16_layers, &avx512::f16_layers},
               {&avx512::f32_winograd, &avx512_bf16::bf16_winograd, &avx512::f16_winograd}});
        }
      }
    }
#endif
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

const Level& choose() {
  const Available& here = available();
  const char* wanted = std::getenv("DAFL_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return here.levels[here.count - 1];
  std::string names;
  for (int i = 0; i < here.count; ++i) {
    if (std::strcmp(wanted, here.names[i]) == 0) return here.levels[i];
    names += (i == 0 ? "" : ", ") + std::string(here.names[i]);
  }
  throw std::runtime_error("DAFL_FAST_ISA must be one of the instruction sets of this machine (" +
                           names + "), got " + wanted);
}

const Level& chosen() {
  static const Level& level = choose();
  return level;
}

// Of a Level's tables.
int index_of(Dtype dtype) { return dtype == Dtype::f32 ? 0 : dtype == Dtype::bf16 ? 1 : 2; }

// AMX, many times as fast as the vector units, which are all that we use.
bool has_matrix_units() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0;
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels(bool f64) {
  const Level& level = chosen();
  return f64 ? baseline::f64_kernels : *level.f32;
}

const LayerKernels& layer_kernels(Dtype dtype) {
  return dtype == Dtype::f64 ? baseline::f64_layers : *chosen().layers[index_of(dtype)];
}

const WinogradKernels& winograd_kernels(Dtype dtype) {
  return dtype == Dtype::f64 ? baseline::f64_winograd : *chosen().winograd[index_of(dtype)];
}

bool winograd_pays(Dtype dtype) {
  const char* name = chosen().name;
  if (dtype == Dtype::f32) return std::strcmp(name, "baseline") != 0;
  return dtype == Dtype::bf16 && std::strcmp(name, "avx512_bf16") == 0 && !has_matrix_units();
}

const char* isa() { return chosen().name; }

const char* const* isa_available() { return available().names; }

}  // namespace cpu
}  // namespace dafl
