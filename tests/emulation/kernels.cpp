// The launchers, compiled with the emulation, behind functions that ctypes can call.
#include "cuda_runtime.h"

#include "../../csrc/cuda/launch.h"

namespace dafl::cuda {
char dafl_shared[kMostShared + kGuard];
}

using namespace dafl;
using namespace dafl::cuda;

namespace {

GeneratorTerms terms(int64_t N, const Matrix* features, int64_t F, const double* weights) {
  GeneratorWeights all;
  memcpy(&all, weights, sizeof all);
  return {all, N, *features, F};
}

}  // namespace

extern "C" {

void set_reversed(bool reversed) { emulation::reversed = reversed; }

int64_t scratch_bytes(int64_t N, int64_t C, bool f64, int sms, int capability) {
  return make_plan(N, C, f64, {sms, capability}).scratch;
}

void generator(int64_t N, int64_t C, int64_t F, const Matrix* logits, const Matrix* features,
               const double* weights, const void* upstream, bool f64, int sms, int capability,
               void** losses, void* row_stats, void* class_mean, double* scratch, void* grad_logits,
               void* grad_features) {
  const Plan plan = make_plan(N, C, f64, {sms, capability});
  GeneratorForward args{N,          C,       *logits, terms(N, features, F, weights), {}, row_stats,
                        class_mean, scratch, f64};
  for (int i = 0; i < kGeneratorLosses; ++i) args.losses[i] = losses[i];
  launch_generator_forward(args, plan, nullptr);
  launch_generator_backward({N, C, *logits, terms(N, features, F, weights), row_stats, class_mean,
                             upstream, Dtype::f32, grad_logits, grad_features, f64},
                            plan, nullptr);
}

void distill(int64_t N, int64_t C, const Matrix* student, const Matrix* teacher, double temperature,
             const void* upstream, bool f64, int sms, int capability, void** losses,
             void* row_stats, double* scratch, void* grad) {
  const Plan plan = make_plan(N, C, f64, {sms, capability});
  launch_distill_forward({N,
                          C,
                          *student,
                          *teacher,
                          1 / temperature,
                          temperature * temperature,
                          {losses[0], losses[1], losses[2]},
                          row_stats,
                          scratch,
                          f64},
                         plan, nullptr);
  launch_distill_backward({N, C, *student, *teacher, 1 / temperature, 1.0 / N, temperature,
                           row_stats, upstream, Dtype::f32, grad, f64},
                          plan, nullptr);
}

void joint(int64_t N, int64_t C, int64_t F, const Matrix* teacher, const Matrix* student,
           const Matrix* features, const double* weights, double temperature, int sms,
           int capability, void** losses, double* scratch, void* grad_teacher, void* grad_features,
           void* grad_student) {
  JointLosses args{N,
                   C,
                   *teacher,
                   *student,
                   terms(N, features, F, weights),
                   1 / temperature,
                   temperature * temperature,
                   temperature,
                   {},
                   scratch,
                   grad_teacher,
                   grad_features,
                   grad_student};
  for (int i = 0; i < kGeneratorLosses + 3; ++i) args.losses[i] = losses[i];
  launch_joint_losses(args, make_plan(N, C, false, {sms, capability}), nullptr);
}
}
