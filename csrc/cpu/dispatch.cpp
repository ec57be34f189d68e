// Which kernels run: the widest that the processor has, or what DAFL_FAST_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "layer_kernels.h"

namespace dafl {
namespace cpu {

namespace baseline {
extern const Kernels f32_kernels, f64_kernels;
extern const LayerKernels f32_layers, bf16_layers, f16_layers, f64_layers;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels f32_kernels;
extern const LayerKernels f32_layers, bf16_layers, f16_layers;
}  // namespace avx2
namespace avx512 {
extern const Kernels f32_kernels;
extern const LayerKernels f32_layers, bf16_layers, f16_layers;
}  // namespace avx512
namespace avx512_bf16 {
extern const LayerKernels bf16_layers;
}  // namespace avx512_bf16
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* f32;
  const LayerKernels* layers[3];  // f32, bf16, f16
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
         {&baseline::f32_layers, &baseline::bf16_layers, &baseline::f16_layers}});
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      add({"avx2", &avx2::f32_kernels, {&avx2::f32_layers, &avx2::bf16_layers, &avx2::f16_layers}});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        add({"avx512",
             &avx512::f32_kernels,
             {&avx512::f32_layers, &avx512::bf16_layers, &avx512::f16_layers}});
        if (__builtin_cpu_supports("avx512bf16")) {
          add({"avx512_bf16",
               &avx512::f32_kernels,
               {&avx512::f32_layers, &avx512_bf16::bf16_layers, &avx512::f16_layers}});
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

}  // namespace

const Kernels& kernels(bool f64) {
  const Level& level = chosen();
  return f64 ? baseline::f64_kernels : *level.f32;
}

const LayerKernels& layer_kernels(Dtype dtype) {
  const Level& level = chosen();
  switch (dtype) {
    case Dtype::f64:
      return baseline::f64_layers;
    case Dtype::f32:
      return *level.layers[0];
    case Dtype::bf16:
      return *level.layers[1];
    default:
      return *level.layers[2];
  }
}

const char* isa() { return chosen().name; }

const char* const* isa_available() { return available().names; }

}  // namespace cpu
}  // namespace dafl
