// Runs every kernel of every instruction set that this processor has, and compares what it writes
// with what the same kernels write when compiled without vector instructions (scalar.cpp).
//
//   check exact|close|memory [NAME...]    fails unless the instruction sets of this processor are
//                                         these
//
// exact: bit for bit, for the order of all operations is the same; NaNs are equal to each other.
// Only the bf16 products of neon_bf16, which that instruction rounds in its own way, have a
// tolerance. close: all floating-point values have a tolerance, because the compiler was free to
// fuse multiplications with additions, and need not choose the same ones. Every kernel runs twice
// into memory full of different junk, between guards: a byte that it does not write, or writes
// outside, is found. memory: only that, on any processor, whose layouts of factors are its own.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "cpu/instruction_set.h"

namespace dafl::cpu {
namespace scalar {
extern const InstructionSet instruction_set;
}

namespace {

using Bytes = std::vector<unsigned char>;
constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};
constexpr const char* kNames[] = {"fp32", "fp64", "bf16", "fp16"};
constexpr size_t kGuard = 64;

// Of the largest value.
double tolerance_of(Dtype dtype) {
  return dtype == Dtype::f64   ? 1e-13
         : dtype == Dtype::f32 ? 1e-5
         : dtype == Dtype::f16 ? 2e-3
                               : 0.01;
}

Dtype compute_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// ---- Inputs ------------------------------------------------------------------------------------

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;

  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  double uniform() { return bits() * 0x1p-31 - 1; }  // [-1, 1)
};

void put(Dtype dtype, double value, unsigned char* to) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  uint16_t half = static_cast<uint16_t>(bits >> 16);  // bf16, rounded towards zero
  if (dtype == Dtype::f16) {                          // so too: these values are normal or zero
    const uint32_t magnitude = bits & 0x7fffffffu;
    half = bits >> 16 & 0x8000u;
    if (magnitude >= 0x7f800000u) {
      half |= magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (magnitude >= 0x38800000u) {
      half |= static_cast<uint16_t>((magnitude - 0x38000000u) >> 13);
    }
  }
  if (dtype == Dtype::f64) std::memcpy(to, &value, 8);
  if (dtype == Dtype::f32) std::memcpy(to, &narrow, 4);
  if (size_of(dtype) == 2) std::memcpy(to, &half, 2);
}

double get(Dtype dtype, const unsigned char* from) {
  double value = 0;
  float narrow = 0;
  uint32_t bits = 0;
  uint16_t half = 0;
  switch (dtype) {
    case Dtype::f64:
      std::memcpy(&value, from, 8);
      return value;
    case Dtype::f32:
      std::memcpy(&narrow, from, 4);
      return narrow;
    case Dtype::bf16:
      std::memcpy(&half, from, 2);
      bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(&narrow, &bits, 4);
      return narrow;
    default:
      std::memcpy(&half, from, 2);
      const int exponent = half >> 10 & 31, mantissa = half & 1023;
      value = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
              : exponent == 0 ? std::ldexp(mantissa, -24)
                              : std::ldexp(mantissa + 1024, exponent - 25);
      return half >> 15 != 0 ? -value : value;
  }
}

Bytes random(Random& source, Dtype dtype, int64_t count, double scale = 1) {
  Bytes values(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    put(dtype, source.uniform() * scale, values.data() + i * size_of(dtype));
  }
  return values;
}

// ---- One run of kernels, and what it wrote -----------------------------------------------------

struct Result {
  std::string name;
  Dtype dtype;
  bool bytes, exact;
  std::vector<unsigned char> memory;  // guard, values, guard

  size_t size() const { return memory.size() - 2 * kGuard; }
  const unsigned char* values() const { return memory.data() + kGuard; }
};

struct Run {
  unsigned char junk;
  std::vector<Result*> results;

  ~Run() {
    for (Result* result : results) delete result;
  }

  void* fresh(const char* name, Dtype dtype, int64_t count, bool exact = true) {
    return add({name, dtype, false, exact, Bytes(count * size_of(dtype) + 2 * kGuard, junk)});
  }
  uint8_t* fresh_bytes(const char* name, int64_t count) {
    return static_cast<uint8_t*>(
        add({name, Dtype::f32, true, true, Bytes(count + 2 * kGuard, junk)}));
  }
  // Kernels add to these.
  double* zeros(const char* name, int64_t count) {
    void* values = fresh(name, Dtype::f64, count);
    std::memset(values, 0, count * sizeof(double));
    return static_cast<double*>(values);
  }
  Bytes scratch(int64_t count, Dtype dtype) const {
    return Bytes(count * size_of(dtype) + 64, junk);
  }

 private:
  void* add(Result result) {
    results.push_back(new Result(std::move(result)));
    return results.back()->memory.data() + kGuard;
  }
};

// Scratch and tensors of PyTorch's begin at 64 bytes.
void* aligned(Bytes& bytes) {
  const auto at = reinterpret_cast<uintptr_t>(bytes.data());
  return reinterpret_cast<void*>((at + 63) / 64 * 64);
}

struct Check {
  const char* set;
  bool exact, values;
  int64_t compared = 0, failed = 0;

  void fail(const std::string& what, const Result& result, const std::string& why) {
    if (++failed <= 20) {
      std::printf("  %s %s, %s: %s\n", set, what.c_str(), result.name.c_str(), why.c_str());
    }
  }

  void guards(const std::string& what, const Result& result, unsigned char junk) {
    const size_t end = result.memory.size() - kGuard;
    for (size_t i = 0; i < kGuard; ++i) {
      if (result.memory[i] != junk || result.memory[end + i] != junk) {
        return fail(what, result, "writes outside");
      }
    }
  }

  void written(const std::string& what, const Result& result, const Result& other) {
    for (size_t i = 0; i < result.size(); ++i) {
      if (result.values()[i] != other.values()[i]) {
        return fail(what, result,
                    "byte " + std::to_string(i) + " is not written, or read from junk");
      }
    }
  }

  void same(const std::string& what, Dtype dtype, const Result& ours, const Result& theirs) {
    ++compared;
    if (!values) return;
    const size_t step = ours.bytes ? 1 : size_of(ours.dtype);
    double tolerance = 0;
    if (!(exact && ours.exact) && !ours.bytes) {
      for (size_t i = 0; i < ours.size(); i += step) {
        const double size = std::fabs(get(theirs.dtype, theirs.values() + i));
        if (std::isfinite(size)) tolerance = std::max(tolerance, size);
      }
      tolerance *= std::max(tolerance_of(ours.dtype),
                            tolerance_of(ours.exact ? compute_of(dtype) : Dtype::bf16));
    }
    for (size_t i = 0; i < ours.size(); i += step) {
      if (std::memcmp(ours.values() + i, theirs.values() + i, step) == 0) continue;
      if (!ours.bytes) {
        const double mine = get(ours.dtype, ours.values() + i);
        const double other = get(theirs.dtype, theirs.values() + i);
        if (std::isnan(mine) && std::isnan(other)) continue;
        if (std::fabs(mine - other) <= tolerance) continue;
        char text[120];
        std::snprintf(text, sizeof text, "value %zu is %.9g, scalar %.9g", i / step, mine, other);
        return fail(what, ours, text);
      }
      return fail(what, ours, "byte " + std::to_string(i) + " differs");
    }
  }

  // body(kernels' set, run); dtype: of the inputs
  template <class Body>
  void operator()(const InstructionSet& own, Dtype dtype, const std::string& what, Body body) {
    Run first{0x5a, {}}, second{0xa5, {}}, expected{0x5a, {}};
    body(own, first);
    body(own, second);
    body(scalar::instruction_set, expected);
    for (size_t i = 0; i < first.results.size(); ++i) {
      const Result &one = *first.results[i], &two = *second.results[i];
      guards(what, one, first.junk);
      guards(what, two, second.junk);
      written(what, one, two);
      same(what, dtype, one, *expected.results[i]);
    }
  }
};

// ---- Losses ------------------------------------------------------------------------------------

struct Rows {
  int64_t N, C;
  bool transposed;

  Matrix matrix(const Bytes& values, Dtype dtype) const {
    return {values.data(), transposed ? 1 : C, transposed ? N : 1, dtype};
  }
  std::string name(Dtype dtype) const {
    return "losses " + std::to_string(N) + " x " + std::to_string(C) +
           (transposed ? " transposed " : " ") + kNames[static_cast<int>(dtype)];
  }
};

void losses(Check& check, const InstructionSet& set, Dtype dtype, const Rows& rows, bool special) {
  const bool f64 = dtype == Dtype::f64;
  if (set.losses[f64] == nullptr) return;
  const auto [N, C, transposed] = rows;
  const Dtype compute = compute_of(dtype);
  Random source;
  Bytes t = random(source, dtype, N * C, 8), s = random(source, dtype, N * C, 8);
  if (special) {
    const double values[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0};
    for (int64_t i = 0; i < N * C; i += 7) {
      put(dtype, values[i / 7 % 5], t.data() + i * size_of(dtype));
    }
  }
  const Bytes slope = random(source, compute, C);
  check(set, dtype, rows.name(dtype), [&](const InstructionSet& of, Run& run) {
    const LossKernels& k = *of.losses[f64];
    Bytes scratch = run.scratch(scratch_size(C), compute);
    void* stats = run.fresh("generator's row_stats", compute, 3 * N);
    k.generator_forward({N, C, rows.matrix(t, dtype), stats}, 0, N,
                        run.zeros("generator's sums", C + kGeneratorSums), aligned(scratch));
    k.generator_backward({N,
                          C,
                          rows.matrix(t, dtype),
                          stats,
                          slope.data(),
                          {0.3, 0.2, 0.1},
                          run.fresh("generator's gradient", dtype, N * C)},
                         0, N, aligned(scratch));
    stats = run.fresh("distill's row_stats", compute, 4 * N);
    k.distill_forward({N, C, rows.matrix(s, dtype), rows.matrix(t, dtype), 0.25, stats}, 0, N,
                      run.zeros("distill's sums", 2), aligned(scratch));
    k.distill_backward({N, C, rows.matrix(s, dtype), rows.matrix(t, dtype), 0.25, stats, 0.7,
                        run.fresh("distill's gradient", dtype, N * C)},
                       0, N, aligned(scratch));
    *run.zeros("abs_sum", 1) = k.abs_sum(rows.matrix(t, dtype), C, 0, N);
    k.sign_gradient(rows.matrix(t, dtype), C, 0, N, 0.3, run.fresh("sign_gradient", dtype, N * C));
  });
}

// ---- Layers ------------------------------------------------------------------------------------

std::string named(const char* layer, Dtype dtype, std::initializer_list<int64_t> sizes) {
  std::string name = layer;
  for (int64_t size : sizes) name += " " + std::to_string(size);
  return name + " " + kNames[static_cast<int>(dtype)];
}

void upsample(Check& check, const InstructionSet& set, Dtype dtype, int64_t N, int64_t H, int64_t W,
              int64_t C) {
  const Upsample a{N, H, W, C};
  Random source;
  const Bytes x = random(source, dtype, N * H * W * C),
              y = random(source, dtype, 4 * N * H * W * C);
  const Bytes data = random(source, dtype, 16 * a.tiles() * C);
  const Bytes products = random(source, dtype, 25 * a.tiles() * C);
  check(set, dtype, named("upsample", dtype, {N, H, W, C}),
        [&](const InstructionSet& of, Run& run) {
          const LayerKernels& k = *of.layers[static_cast<int>(dtype)];
          k.differences(a, x.data(), run.fresh("differences", dtype, 16 * a.tiles() * C));
          k.differences_adjoint(a, data.data(),
                                run.fresh("differences_adjoint", dtype, N * H * W * C));
          k.interleave(a, products.data(), run.fresh("interleave", dtype, 4 * N * H * W * C));
          k.interleave_adjoint(a, y.data(),
                               run.fresh("interleave_adjoint", dtype, 25 * a.tiles() * C));
        });
}

void norm(Check& check, const InstructionSet& set, Dtype dtype, int64_t rows, int64_t C) {
  const Dtype compute = compute_of(dtype);
  Random source;
  const Bytes x = random(source, dtype, rows * C), grad = random(source, dtype, rows * C);
  const Bytes scale = random(source, compute, C), shift = random(source, compute, C);
  const Bytes mean = random(source, compute, C), by_x = random(source, compute, C);
  check(set, dtype, named("norm", dtype, {rows, C}), [&](const InstructionSet& of, Run& run) {
    const LayerKernels& k = *of.layers[static_cast<int>(dtype)];
    const NormActivation a{rows, C, scale.data(), shift.data(), 0.2};
    const auto sums = [&](const char* name) {
      return static_cast<double*>(run.fresh(name, Dtype::f64, 2 * C));
    };
    k.moments(x.data(), rows, C, sums("moments"));
    k.norm_activation(a, x.data(), run.fresh("norm_activation", dtype, rows * C));
    k.norm_sums(a, x.data(), grad.data(), mean.data(), sums("norm_sums"));
    k.norm_gradient(a, x.data(), grad.data(), by_x.data(), mean.data(),
                    run.fresh("norm_gradient", dtype, rows * C));
  });
}

void image_conv(Check& check, const InstructionSet& set, Dtype dtype, int64_t N, int64_t H,
                int64_t W, int64_t C) {
  const Dtype compute = compute_of(dtype);
  Random source;
  const Bytes planes = random(source, dtype, 9 * C * N * H * W);
  const Bytes y = random(source, dtype, C * N * H * W), bias = random(source, compute, C);
  check(set, dtype, named("image_conv", dtype, {N, H, W, C}),
        [&](const InstructionSet& of, Run& run) {
          const LayerKernels& k = *of.layers[static_cast<int>(dtype)];
          Bytes scratch = run.scratch(3 * (W + 32), compute);
          k.sum_shifted({N, H, W, C}, planes.data(), bias.data(),
                        run.fresh("sum_shifted", dtype, C * N * H * W), aligned(scratch));
          k.shift_apart({N, H, W, C}, y.data(), run.fresh("shift_apart", dtype, 9 * C * N * H * W));
        });
}

void pool(Check& check, const InstructionSet& set, Dtype dtype, int64_t N, int64_t in, int64_t H,
          int64_t W, int64_t out) {
  const Dtype compute = compute_of(dtype);
  Random source;
  const Bytes x = random(source, dtype, N * in * H * W);
  const Bytes weight = random(source, compute, in * 25 * out), bias = random(source, compute, out);
  ConvPool a{N, in, H, W, out, x.data(), weight.data(), bias.data(), nullptr};
  const int64_t pooled = out * a.pooled_height() * a.pooled_width();
  const Bytes grad = random(source, dtype, N * pooled);
  check(set, dtype, named("conv_pool", dtype, {N, in, H, W, out}),
        [&](const InstructionSet& of, Run& run) {
          const LayerKernels& k = *of.layers[static_cast<int>(dtype)];
          const int64_t room = (N + kConvPoolImages - 1) / kConvPoolImages * kConvPoolImages;
          a.index = run.fresh_bytes("index", room * pooled);
          Bytes scratch = run.scratch(k.conv_pool_scratch(a), compute);
          k.conv_pool(a, 0, N, run.fresh("y", dtype, N * pooled), aligned(scratch));
          Bytes again = run.scratch(k.conv_pool_scratch(a), compute);
          void* grad_x = run.fresh("grad_x", dtype, N * in * H * W);
          void* sums = run.fresh("gradients of weight and bias", Dtype::f64, out * in * 25 + out);
          k.conv_pool_gradient(a, 0, N, grad.data(), grad_x, static_cast<double*>(sums),
                               aligned(again));
        });
}

// ---- 3x3 convolution ---------------------------------------------------------------------------

void conv3x3(Check& check, const InstructionSet& set, Dtype dtype, int64_t N, int64_t H, int64_t W,
             int64_t Ci, int64_t Co) {
  const Dtype compute = compute_of(dtype);
  const Tiles tiles{N, H, W};
  const int64_t count = tiles.count();
  Random source;
  const Bytes x = random(source, dtype, N * H * W * Ci),
              grad = random(source, dtype, N * H * W * Co);
  const Bytes weight = random(source, compute, Co * 9 * Ci), bias = random(source, compute, Co);
  const bool exact = std::string(set.name) != "neon_bf16";
  check(set, dtype, named("conv3x3", dtype, {N, H, W, Ci, Co}),
        [&](const InstructionSet& of, Run& run) {
          const WinogradKernels& k = *of.winograd[static_cast<int>(dtype)];
          const auto padded = [&](int64_t C) { return (C + k.panel - 1) / k.panel * k.panel; };
          const int64_t in = padded(Ci), out = padded(Co);
          void* forward = run.fresh("forward factors", dtype, 16 * in * out);
          void* backward = run.fresh("backward factors", dtype, 16 * in * out);
          k.factors(Co, Ci, weight.data(), 0, out, forward, backward);

          Bytes data = run.scratch(16 * plane_of(count, in), dtype);
          Bytes products = run.scratch(16 * plane_of(count, k.panel), compute);
          k.inputs(tiles, Ci, x.data(), 0, count, aligned(data));
          k.outputs(tiles, Ci, Co, aligned(data), forward, bias.data(), 0, count, aligned(products),
                    run.fresh("y", dtype, N * H * W * Co, exact));

          // The weight's gradient in two calls, whose sums are kept between.
          const int64_t most = count > 2 ? (count + 3) / 4 * 2 : count;
          const int64_t items = in / k.panel * ((Co + k.lanes - 1) / k.lanes);
          Bytes sums = run.scratch(items * 16 * k.lanes * k.panel, compute);
          void* to = run.fresh("gradient of weight", compute, Co * 9 * Ci, exact);
          for (int64_t first = 0, last; first < count; first = last) {
            last = std::min(first + most, count);
            const int64_t row = row_of_steps(last - first, k.unit) * k.unit;
            Bytes by_tile = run.scratch(16 * row * in, dtype),
                  grads = run.scratch(16 * row * out, dtype);
            const TileRange range{first, last, first, last};
            k.inputs_by_tile(tiles, Ci, x.data(), range, aligned(by_tile));
            k.output_grads(tiles, Co, grad.data(), range, aligned(grads));
            k.weight_gradient({last - first, Co, Ci, first == 0, last == count, aligned(grads),
                               aligned(by_tile), aligned(sums), to},
                              0, items);
          }
        });
}

// ---- All of them -------------------------------------------------------------------------------

int64_t check_set(const InstructionSet& set, bool exact, bool values) {
  Check check{set.name, exact, values};
  for (Dtype dtype : kDtypes) {
    for (int64_t N : {1, 2, 3, 4, 5, 15, 17, 70}) {
      for (int64_t C : {1, 2, 4, 5, 10, 31, 32, 33, 100}) {
        losses(check, set, dtype, {N, C, false}, false);
        losses(check, set, dtype, {N, C, true}, true);
      }
    }
    losses(check, set, dtype, {300, 10, false}, false);
    losses(check, set, dtype, {3, 1025, false}, true);
    const int at = static_cast<int>(dtype);
    if (set.layers[at] != nullptr) {
      for (int64_t C : {1, 3, 4, 5, 8, 17}) {
        for (int64_t H : {1, 2, 3, 5}) {
          for (int64_t W : {1, 2, 4, 7}) upsample(check, set, dtype, 2, H, W, C);
        }
        for (int64_t rows : {1, 2, 3, 4, 5, 70}) norm(check, set, dtype, rows, C);
      }
      for (int64_t W : {1, 2, 3, 4, 5, 8, 17}) {
        for (int64_t H : {1, 2, 5}) image_conv(check, set, dtype, 2, H, W, 3);
      }
      for (int64_t N = 1; N <= 70; N += N < 20 ? 1 : 10) pool(check, set, dtype, N, 2, 7, 8, 3);
      for (int64_t out : {1, 2, 4, 5, 9}) pool(check, set, dtype, 3, out, 8, 9, 10 - out);
    }
    if (set.winograd[at] != nullptr) {
      for (int64_t C : {1, 3, 4, 5, 16, 17, 35}) {
        for (int64_t H : {1, 2, 3, 6}) {
          conv3x3(check, set, dtype, 1, H, 5, C, 7);
          conv3x3(check, set, dtype, 3, 4, H, 6, C);
        }
      }
    }
  }
  std::printf("%s: %lld results %s, %lld wrong\n", set.name, static_cast<long long>(check.compared),
              exact    ? "compared bit by bit"
              : values ? "compared"
                       : "in their places",
              static_cast<long long>(check.failed));
  return check.failed;
}

}  // namespace
}  // namespace dafl::cpu

int main(int argc, char** argv) {
  using namespace dafl::cpu;
  std::string wanted, here;
  const std::string how = argc > 1 ? argv[1] : "";
  const bool exact = how == "exact", values = how != "memory";
  for (int i = 2; i < argc; ++i) wanted += std::string(" ") + argv[i];
  for (const char* const* name = isa_available(); *name != nullptr; ++name) {
    here += std::string(" ") + *name;
  }
  if (argc > 2 && here != wanted) {
    std::printf("the instruction sets should be%s; they are%s\n", wanted.c_str(), here.c_str());
    return 1;
  }
  int64_t failed = 0;
#define DAFL_CHECK(name) \
  if (name::instruction_set.supported()) failed += check_set(name::instruction_set, exact, values);
  DAFL_INSTRUCTION_SETS(DAFL_CHECK)
  return failed != 0;
}
