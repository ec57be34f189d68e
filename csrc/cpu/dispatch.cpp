// Which kernels run: the widest that the processor has, or what DAFL_FAST_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace dafl {
namespace cpu {

namespace baseline {
extern const Kernels f32_kernels, f64_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels f32_kernels;
}
namespace avx512 {
extern const Kernels f32_kernels;
}
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* f32;
};

// Levels that can run here, narrowest first, and their number.
struct Available {
  Level levels[3];
  const char* names[4];
  int count = 0;

  void add(const char* name, const Kernels& f32) {
    levels[count] = {name, &f32};
    names[count++] = name;
  }

  Available() : names{} {
    add("baseline", baseline::f32_kernels);
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      add("avx2", avx2::f32_kernels);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        add("avx512", avx512::f32_kernels);
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

const char* isa() { return chosen().name; }

const char* const* isa_available() { return available().names; }

}  // namespace cpu
}  // namespace dafl
