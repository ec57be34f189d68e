// The part of CUDA that csrc/cuda uses, on one CPU thread: kernels run unchanged, each GPU thread
// as a fiber. Barriers and shuffles switch fibers, so what is tested is the kernels' own indexing,
// barriers and order of summation. Memory ordering, timing and hardware limits are not.
//
// Made to find mistakes: shared memory starts as NaNs, its end is guarded, a barrier that not all
// threads reach stops the program, and fibers run in either order (`reversed`), so that a missing
// barrier changes results.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__ [[maybe_unused]] static
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
struct ushort4 {
  unsigned short x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z,
                            unsigned short w) {
  return {x, y, z, w};
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace dafl::cuda {
constexpr size_t kMostShared = 48 << 10, kGuard = 4096;
extern __attribute__((aligned(16))) char dafl_shared[kMostShared + kGuard];
}  // namespace dafl::cuda

namespace emulation {

using dafl::cuda::dafl_shared;
using dafl::cuda::kGuard;
using dafl::cuda::kMostShared;

enum Wait { kRunnable, kWarp, kBlock, kCluster, kDone };

// A fiber starts through its ucontext; from then on switches are jumps, which save no signal mask
// and so cost no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started;
  unsigned block, thread;  // block: its rank in the cluster
  Wait wait;
  int turn;  // of the shuffle slots
};

inline bool reversed = false;
inline std::vector<Fiber> fibers;
inline std::vector<std::vector<char>> shared;  // of the cluster's blocks that are switched out
inline std::vector<unsigned> slots;            // [turn][fiber]
inline std::vector<char> stacks;
inline ucontext_t scheduler_context;
inline jmp_buf scheduler;
inline Fiber* current;
inline int resident;  // whose shared memory stands in dafl_shared
inline std::function<void()> body;
inline unsigned blocks, threads, first_block;
inline size_t used;  // dynamic shared memory of the launch
constexpr size_t kStack = 32 << 10;

inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, current->block, current->thread);
  abort();
}

inline void wait(Wait kind) {
  Fiber* self = current;
  self->wait = kind;
  if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
  body();
  current->wait = kDone;
  _longjmp(scheduler, 1);
}

inline void check_guard() {
  for (size_t i = used; i < kMostShared + kGuard; ++i) {
    if (dafl_shared[i] != 0x5a) fail("shared memory written behind its end");
  }
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  if (resident != static_cast<int>(fiber.block)) {
    memcpy(shared[resident].data(), dafl_shared, used);
    memcpy(dafl_shared, shared[fiber.block].data(), used);
    resident = fiber.block;
  }
  threadIdx = dim3(fiber.thread, 0, 0);
  const unsigned block = first_block + fiber.block;
  blockIdx = dim3(block % gridDim.x, block / gridDim.x, 0);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  swapcontext(&scheduler_context, &fiber.context);
}

// Lets a group's fibers go on if all of them wait for one another.
inline bool release(size_t begin, size_t end, Wait kind) {
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].wait != kind) return false;
  }
  for (size_t i = begin; i < end; ++i) fibers[i].wait = kRunnable;
  return true;
}

inline void run_cluster() {
  const size_t count = static_cast<size_t>(blocks) * threads;
  fibers.assign(count, Fiber{});
  slots.assign(2 * count, 0);
  shared.assign(blocks, std::vector<char>(used, '\xff'));
  if (stacks.size() < count * kStack) stacks.resize(count * kStack);
  memset(dafl_shared, 0x5a, kMostShared + kGuard);
  memset(dafl_shared, 0xff, used);
  resident = 0;
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.block = i / threads;
    fiber.thread = i % threads;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  for (;;) {
    bool ran = false;
    for (size_t n = 0; n < count; ++n) {
      Fiber& fiber = fibers[reversed ? count - 1 - n : n];
      if (fiber.wait != kRunnable) continue;
      resume(fiber);
      ran = true;
    }
    if (ran) {
      bool released = false;
      for (size_t w = 0; w < count; w += 32) released |= release(w, w + 32, kWarp);
      for (unsigned b = 0; b < blocks; ++b) {
        released |= release(b * threads, (b + 1) * threads, kBlock);
      }
      released |= release(0, count, kCluster);
      if (released) continue;
    }
    bool done = true;
    for (Fiber& fiber : fibers) done &= fiber.wait == kDone;
    if (!done) fail("threads wait for threads that never come");
    check_guard();
    return;
  }
}

inline void run(const cudaLaunchConfig_t& config) {
  blocks = config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
  threads = config.blockDim.x;
  used = config.dynamicSmemBytes;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const unsigned total = gridDim.x * gridDim.y;
  if (config.dynamicSmemBytes > kMostShared || threads % 32 != 0 || threads > 1024 ||
      total % blocks != 0 || total == 0) {
    fprintf(stderr, "emulation: a launch that no GPU accepts\n");
    abort();
  }
  for (first_block = 0; first_block < total; first_block += blocks) {
    run_cluster();
  }
}

}  // namespace emulation

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  emulation::body = [=] { kernel(arguments...); };
  emulation::run(*config);
  return cudaSuccess;
}

inline void __syncthreads() { emulation::wait(emulation::kBlock); }

inline unsigned __shfl_slot(unsigned value, int lane) {
  using namespace emulation;
  Fiber* self = current;
  const size_t index = self - fibers.data();
  unsigned* turn = slots.data() + self->turn * fibers.size();
  self->turn ^= 1;
  turn[index] = value;
  wait(kWarp);
  return turn[index / 32 * 32 + lane];
}
inline unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
  return __shfl_slot(value, (threadIdx.x % 32) ^ mask);
}
inline double __shfl_sync(unsigned, double value, int lane) {
  unsigned words[2];
  memcpy(words, &value, 8);
  for (unsigned& word : words) word = __shfl_slot(word, lane);
  memcpy(&value, words, 8);
  return value;
}
