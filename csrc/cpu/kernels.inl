// All CPU kernels for one instruction set. Its file (baseline.cpp, avx2.cpp ...) defines
//   DAFL_ISA            its name, which is also the namespace of all that is here
//   DAFL_VECTOR_BYTES   a vector's width
//   DAFL_TARGET         what the compiler may use, as in its attribute `target`; none: the default
//   DAFL_ISA::supported whether the processor has it
// and includes this file once. DAFL_ONLY_BF16: only what bf16 products make faster is compiled; the
// rest would be the same code as the set's before it again.
//
// One rule: nothing that has a linkage of its own may be compiled with wide instructions. An inline
// function or a template's instance of the standard library could become the copy that the linker
// keeps for everybody, and stop the program on a processor without them. So every include that is
// not ours comes before the pragma, all kernels are in an unnamed namespace, what row_math.h has is
// always inlined, and nothing here uses the standard library.

#ifdef DAFL_TARGET
#define DAFL_PRAGMA_(...) _Pragma(#__VA_ARGS__)
#define DAFL_PRAGMA(...) DAFL_PRAGMA_(__VA_ARGS__)
#if defined(__clang__)
DAFL_PRAGMA(clang attribute push(__attribute__((target(DAFL_TARGET))), apply_to = function))
#else
#pragma GCC push_options
DAFL_PRAGMA(GCC target(DAFL_TARGET))
#endif
#endif

#include "../row_math.h"

namespace dafl {
namespace cpu {
namespace DAFL_ISA {
namespace {

#include "vectors.inl"
#ifndef DAFL_ONLY_BF16
#include "losses.inl"
#include "generator_loss.inl"
#include "distill_loss.inl"
#endif
#include "products.inl"
#include "upsample_conv.inl"
#include "norm_activation.inl"
#include "norm_image_conv.inl"
#include "conv_pool.inl"
#include "winograd.inl"

#ifndef DAFL_ONLY_BF16
template <class M>
constexpr LossKernels kLosses = {generator_forward<M>, generator_backward<M>,
                                 distill_forward<M>,   distill_backward<M>,
                                 abs_sum<M>,           sign_gradient<M>};
#endif

template <class M>
constexpr UpsamplePanels kUpsample = {kWidth<M>,          Panels<M>::scratch,
                                      Panels<M>::factors, Panels<M>::factors_adjoint,
                                      Panels<M>::outputs, Panels<M>::gradients};

template <class M>
constexpr ImageKernels kImage = {ImageProducts<M>::scratch, ImageProducts<M>::planes,
                                 ImageProducts<M>::sums, ImageProducts<M>::gradients};

// Products of our own are for fp32 with AVX2 and AVX-512. There they are faster than a library's,
// as data and products stay in the caches, and MKL's get no more than half out of some AMD cores:
// see docs/cpu.md. A table and no measurement, so that a resumed run computes the same.
template <class M>
constexpr bool kMultiplies = DAFL_VECTOR_BYTES >= 32 && sizeof(typename M::T) == 4;

template <class M>
constexpr const UpsamplePanels* upsample() {
  if constexpr (kMultiplies<M>) return &kUpsample<M>;
  return nullptr;
}

template <class M>
constexpr const ImageKernels* image() {
  if constexpr (kMultiplies<M>) return &kImage<M>;
  return nullptr;
}

template <class M>
constexpr LayerKernels kLayers = {upsample<M>(),
                                  image<M>(),
                                  differences<M, InRows>,
                                  differences_adjoint<M, InRows>,
                                  interleave<M>,
                                  interleave_adjoint<M, InRows>,
                                  moments<M>,
                                  norm_activation<M>,
                                  norm_sums<M>,
                                  norm_gradient<M>,
                                  sum_shifted<M>,
                                  shift_apart<M>,
                                  conv_pool_scratch<M>,
                                  conv_pool<M>,
                                  conv_pool_gradient<M>};

template <class M>
constexpr WinogradKernels kWinograd = {M::lanes,
                                       Panel<M>::width,
                                       M::unit,
                                       inputs<M>,
                                       outputs<M>,
                                       by_tile<M, Inputs>,
                                       by_tile<M, OutputGrads>,
                                       weight_gradient<M>,
                                       factors<M>};

}  // namespace

#define DAFL_STRING_(x) #x
#define DAFL_STRING(x) DAFL_STRING_(x)

extern const InstructionSet instruction_set;
const InstructionSet instruction_set = {
    DAFL_STRING(DAFL_ISA),
    supported,
#if defined(DAFL_ONLY_BF16)
    {},
    {nullptr, nullptr, &kLayers<Access<MemoryBf16>>},
    {nullptr, nullptr, &kWinograd<Pair<MemoryBf16>>},
#ifdef DAFL_AVX512_BF16
    {true, false, true, false},
#else
    {},  // on ARM nobody has measured it
#endif
#elif defined(DAFL_WITH_F64)
    {&kLosses<FloatMath>, &kLosses<DoubleMath>},
    {&kLayers<Access<MemoryF32>>, &kLayers<Access<MemoryF64>>, &kLayers<Access<MemoryBf16>>,
     &kLayers<Access<MemoryF16>>},
    {&kWinograd<Single<MemoryF32>>, &kWinograd<Single<MemoryF64>>, &kWinograd<Pair<MemoryBf16>>,
     &kWinograd<Pair<MemoryF16>>},
    {},
#else
    {&kLosses<FloatMath>},
    {&kLayers<Access<MemoryF32>>, nullptr, &kLayers<Access<MemoryBf16>>,
     &kLayers<Access<MemoryF16>>},
    {&kWinograd<Single<MemoryF32>>, nullptr, &kWinograd<Pair<MemoryBf16>>,
     &kWinograd<Pair<MemoryF16>>},
    {true, false, false, false},
#endif
};

}  // namespace DAFL_ISA
}  // namespace cpu
}  // namespace dafl

#ifdef DAFL_TARGET
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
