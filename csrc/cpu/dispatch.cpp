// Which kernels run: those of the widest instruction set that the processor has, or of the one that
// DAFL_FAST_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "instruction_set.h"

namespace dafl {
namespace cpu {

namespace {

#define DAFL_ADDRESS(name) &name::instruction_set,
const InstructionSet* const kAll[] = {DAFL_INSTRUCTION_SETS(DAFL_ADDRESS)};
constexpr int kCount = sizeof(kAll) / sizeof(*kAll);

// Those that can run here, narrowest first and without gaps, and their names.
struct Available {
  InstructionSet sets[kCount] = {};
  const char* names[kCount + 1] = {};
  int count = 0;

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    while (count < kCount && kAll[count]->supported()) {
      const InstructionSet own = *kAll[count];
      InstructionSet& all = sets[count] = own;
      if (count > 0) {
        const InstructionSet& before = sets[count - 1];
        for (int i = 0; i < 2; ++i)
          all.losses[i] = own.losses[i] ? own.losses[i] : before.losses[i];
        for (int i = 0; i < 4; ++i) {
          all.layers[i] = own.layers[i] ? own.layers[i] : before.layers[i];
          all.winograd[i] = own.winograd[i] ? own.winograd[i] : before.winograd[i];
        }
      }
      names[count++] = own.name;
    }
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

const InstructionSet& choose() {
  const Available& here = available();
  const char* wanted = std::getenv("DAFL_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return here.sets[here.count - 1];
  std::string names;
  for (int i = 0; i < here.count; ++i) {
    if (std::strcmp(wanted, here.names[i]) == 0) return here.sets[i];
    names += (i == 0 ? "" : ", ") + std::string(here.names[i]);
  }
  throw std::runtime_error("DAFL_FAST_ISA must be one of the instruction sets of this machine (" +
                           names + "), got " + wanted);
}

const InstructionSet& chosen() {
  static const InstructionSet& set = choose();
  return set;
}

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

const LossKernels& loss_kernels(bool f64) { return *chosen().losses[f64]; }

const LayerKernels& layer_kernels(Dtype dtype) { return *chosen().layers[static_cast<int>(dtype)]; }

const WinogradKernels& winograd_kernels(Dtype dtype) {
  return *chosen().winograd[static_cast<int>(dtype)];
}

bool winograd_pays(Dtype dtype) {
  return chosen().winograd_pays[static_cast<int>(dtype)] &&
         (dtype != Dtype::bf16 || !has_matrix_units());
}

const char* isa() { return chosen().name; }

const char* const* isa_available() { return available().names; }

}  // namespace cpu
}  // namespace dafl
