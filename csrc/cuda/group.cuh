// The threads that share a row: sums and maxima in fixed order over some lanes of a warp, and what
// the warps of a block or a cluster tell each other.
//
// Order is fixed everywhere: a warp's butterfly adds the same pairs in every lane, and what crosses
// warps, blocks or launches is written to memory and added by index. No atomics, so the same bits
// on every run.
#pragma once

#include <cooperative_groups.h>

#include <climits>

#include "memory.cuh"
#include "plan.h"

// Kernels with clusters are compiled for every architecture but exist only where clusters do; the
// planner chooses them nowhere else. (Undefined: the host's half, where nothing runs.)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DAFL_CLUSTERS 1
#else
#define DAFL_CLUSTERS 0
#endif

namespace dafl {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory; plan.h says how much there is.
__device__ inline char* block_shared() {
  extern __shared__ __align__(16) char dafl_shared[];
  return dafl_shared;
}

// ---- A warp ------------------------------------------------------------------------------------

__device__ inline float shuffle(float value, int mask) {
  return __uint_as_float(__shfl_xor_sync(kAllLanes, __float_as_uint(value), mask));
}

__device__ inline double shuffle(double value, int mask) {
  unsigned words[2];
  memcpy(words, &value, 8);
  words[0] = __shfl_xor_sync(kAllLanes, words[0], mask);
  words[1] = __shfl_xor_sync(kAllLanes, words[1], mask);
  memcpy(&value, words, 8);
  return value;
}

__device__ inline int shuffle(int value, int mask) {
  return static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<unsigned>(value), mask));
}

// Over kLanes consecutive lanes each; all lanes of the warp take part.
template <int kLanes = kWarp, class T>
__device__ T lane_sum(T value) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle(value, mask);
  return value;
}

// A NaN is passed over.
template <int kLanes = kWarp>
__device__ float lane_max(float value) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle(value, mask));
  return value;
}

template <int kLanes = kWarp>
__device__ int lane_count(int value) {
  if constexpr (kLanes == kWarp) {
    return __reduce_add_sync(kAllLanes, value);
  } else {
    return lane_sum<kLanes>(value);
  }
}

template <int kLanes = kWarp>
__device__ int lane_min(int value) {
  if constexpr (kLanes == kWarp) {
    return __reduce_min_sync(kAllLanes, value);
  } else {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value = min(value, shuffle(value, mask));
    return value;
  }
}

// ---- Messages between the blocks of a cluster --------------------------------------------------

// A barrier in shared memory that counts the bytes sent to it.

#if defined(__CUDA_ARCH__) && DAFL_CLUSTERS

__device__ inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

__device__ inline void mailbox_open(uint64_t* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One thread of the block, each time, before it waits.
__device__ inline void mailbox_expect(uint64_t* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)),
               "r"(bytes)
               : "memory");
}

// A value to the same place in block `rank`.
template <class V>
__device__ void mailbox_send(V* to, const V& value, uint64_t* box, int rank) {
  static_assert(sizeof(V) % 4 == 0, "sent by words");
  unsigned there, their_box, words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(their_box)
      : "r"(shared_address(box)), "r"(rank));
  constexpr int kWords = sizeof(V) / 4;
#pragma unroll
  for (int w = 0; w < kWords;) {
    if (kWords % 4 == 0) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, "
          "%4}, [%5];" ::"r"(there + 4 * w),
          "r"(words[w]), "r"(words[w + 1]), "r"(words[w + 2]), "r"(words[w + 3]), "r"(their_box)
          : "memory");
      w += 4;
    } else {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
              there + 4 * w),
          "r"(words[w]), "r"(their_box)
          : "memory");
      w += 1;
    }
  }
}

__device__ inline void mailbox_wait(uint64_t* box, unsigned phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(box)),
      "r"(phase)
      : "memory");
}

#else  // tests/emulation has them

__device__ void mailbox_open(uint64_t* box);
__device__ void mailbox_expect(uint64_t* box, int bytes);
template <class V>
__device__ void mailbox_send(V* to, const V& value, uint64_t* box, int rank);
__device__ void mailbox_wait(uint64_t* box, unsigned phase);

#endif

// ---- Blocks and clusters -----------------------------------------------------------------------

// A group of threads as a kernel sees it: some lanes of a warp, a warp, a block, or the blocks of a
// cluster. Kernels that hold a row in registers have one for each row: kGroup threads own kValues
// columns each, and a multiprocessor should have room for kBlocks blocks, which bounds a thread's
// registers.
template <int kGroup_, int kValues_, bool kCluster_, int kBlocks_>
struct Rows {
  static constexpr int kGroup = kGroup_;
  static constexpr int kValues = kValues_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = kGroup <= kWarp ? kWarpsPerBlock * kWarp : kGroup;
  static constexpr int kGroups = kThreads / kGroup;  // rows that a block has at a time
  static constexpr int kLanes = kGroup < kWarp ? kGroup : kWarp;
  static constexpr int kWarps = kGroup / kLanes;  // of a group, in one block
};

template <class R>
__device__ int cluster_blocks_of() {
#if DAFL_CLUSTERS
  if constexpr (R::kCluster) return cooperative_groups::this_cluster().num_blocks();
#endif
  return 1;
}

// The warps of a group tell each other values; all of their threads must do so together.
//
// Two sets of slots in shared memory take turns, so that one wait each time is enough: who writes a
// set again has waited the time between, and that wait ends only when all have done reading the set
// before.
//
// In a cluster every warp tells every block. Its messages count themselves at the receiver's
// barrier, which costs less than the cluster's own: that one waits for all earlier memory accesses.
template <class R>
struct Group {
  static_assert(R::kWarps * (R::kCluster ? kMaxCluster : 1) <= kSlots, "plan.h");
  // Values that a lane hears.
  static constexpr int kHeard = R::kCluster ? R::kWarps * kMaxCluster / kWarp : 1;

  int thread;  // in the group
  char* slots;
  int turn = 0;
  unsigned phases = 0;  // a bit for each set

  __device__ explicit Group(char* shared) : slots(shared) {
    thread = threadIdx.x % R::kGroup;
#if DAFL_CLUSTERS
    if constexpr (R::kCluster) {
      const auto cluster = cooperative_groups::this_cluster();
      thread += cluster.block_rank() * R::kGroup;
      if (threadIdx.x == 0) {
        mailbox_open(mailbox(0));
        mailbox_open(mailbox(1));
      }
      // No block may write to another's shared memory before that one runs. Afterwards none can
      // leave too early: it has waited for all that is sent to it.
      cluster.sync();
    }
#endif
  }

  __device__ uint64_t* mailbox(int set) const {
    return reinterpret_cast<uint64_t*>(slots + 2 * kSlots * kSlotBytes) + set;
  }

  // Every warp's value: lane l gets those of warps l, l + 32, ... of the group, and `none` where
  // there is no such warp.
  template <class V>
  __device__ void tell(const V& value, const V& none, V (&heard)[kHeard]) {
    static_assert(sizeof(V) <= kSlotBytes, "plan.h");
    if constexpr (R::kWarps == 1) {
      heard[0] = value;
      return;
    }
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x % R::kGroup / kWarp;
    V* set = reinterpret_cast<V*>(slots + turn * kSlots * kSlotBytes);
    int warps = R::kWarps;
#if DAFL_CLUSTERS
    if constexpr (R::kCluster) {
      const auto cluster = cooperative_groups::this_cluster();
      const int blocks = cluster.num_blocks();
      warps *= blocks;
      uint64_t* box = mailbox(turn);
      if (threadIdx.x == 0) mailbox_expect(box, warps * sizeof(V));
      if (lane < blocks) {
        mailbox_send(set + cluster.block_rank() * R::kWarps + warp, value, box, lane);
      }
      mailbox_wait(box, phases >> turn & 1);
      phases ^= 1u << turn;
    }
#endif
    if constexpr (!R::kCluster) {
      if (lane == 0) set[warp] = value;
      __syncthreads();
    }
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kHeard; ++i) {
      const int at = lane + i * kWarp;
      heard[i] = at < warps ? set[at] : none;
    }
  }

  // The same bits for all threads of the group.
  template <class T>
  __device__ T sum(T value) {
    value = lane_sum<R::kLanes>(value);
    if constexpr (R::kWarps > 1) {
      T heard[kHeard];
      tell(value, T(0), heard);
      value = heard[0];
#pragma unroll
      for (int i = 1; i < kHeard; ++i) value += heard[i];
      value = lane_sum(value);
    }
    return value;
  }
};

// A whole block whose threads share no row.
template <int kThreads>
using Block = Group<Rows<kThreads, 1, false, 1>>;

}  // namespace cuda
}  // namespace dafl
