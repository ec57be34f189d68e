// Kernels that are right or wrong in one way, for tests/test_emulation.py. Each gets memory for its
// own use and says what is wrong with it by way of the emulation.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dafl::cuda {
char dafl_shared[kMostShared + kGuard];
}

namespace {

constexpr unsigned kAll = 0xffffffffu;

float* shared() { return reinterpret_cast<float*>(dafl::cuda::dafl_shared); }

__global__ void sums(int* out) {
  const int lane = threadIdx.x % 32, value = lane - 7;
  out += threadIdx.x * 16;
  out[0] = __shfl_sync(kAll, value, 5);
  out[1] = __shfl_xor_sync(kAll, value, 16);
  out[2] = __shfl_down_sync(kAll, value, 1);
  out[3] = __shfl_up_sync(kAll, value, 1, 8);
  out[4] = __reduce_add_sync(kAll, value);
  out[5] = __reduce_min_sync(kAll, value);
  out[6] = __reduce_max_sync(kAll, value);
  out[7] = __reduce_min_sync(kAll, static_cast<unsigned>(value));
  out[8] = __reduce_max_sync(kAll, static_cast<unsigned>(value));
  out[9] = __ballot_sync(kAll, lane % 3 == 0);
  out[10] = __any_sync(kAll, lane == 9);
  out[11] = __all_sync(kAll, lane < 31);
  if (lane < 8) out[12] = __reduce_add_sync(0xffu, value);  // the others take no part
  if (lane >= 8) out[12] = __shfl_xor_sync(~0xffu, value, 1);
  const double wide = __shfl_sync(kAll, value + 0.5, 3);
  out[13] = static_cast<int>(2 * wide);
  out[14] = __popc(__activemask());
  __syncwarp();
  out[15] = 1;
}

__global__ void numbers(float* out) {
  if (threadIdx.x != 0) return;
  const float nan = __int_as_float(0x7fc00000);
  out[0] = fmaxf(nan, 2);
  out[1] = fminf(3, nan);
  out[2] = max(-1.0f, nan);
  out[3] = static_cast<float>(max(3, -4) + min(int64_t(1) << 40, int64_t(5)));
  const __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, 1.00390625f);  // a tie: to even
  unsigned bits;
  memcpy(&bits, &pair, 4);
  out[4] = bits == 0x3f803f80u;
  const float2 halves = __half22float2(__floats2half2_rn(65504, -1.5f));
  out[5] = halves.x;
  out[6] = halves.y;
  out[7] = __fmaf_rn(0.1f, 10, -1) != __fadd_rn(__fmul_rn(0.1f, 10), -1);
  out[8] = static_cast<float>(__float_as_uint(1.0f) >> 23) +
           static_cast<float>(__float_as_int(-0.0f) < 0);
  const uint4 four = make_uint4(1, 2, 3, 4);
  out[9] = static_cast<float>(four.w + make_uint2(5, 6).y) + make_float2(7, 8).y + exp2f(3);
  out[10] = __ldg(out + 9);
}

// Who came first: a block's threads, and the blocks, count themselves.
__global__ void turns(int* out) {
  const int turn = out[0]++;
  out[1 + blockIdx.x * blockDim.x + threadIdx.x] = turn;
}

__global__ void barrier_missing(float* out) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared()[(threadIdx.x + 32) % blockDim.x];
}

__global__ void barrier_skipped(float*) {
  if (threadIdx.x != 40) __syncthreads();
}

__global__ void unnamed_lane(float*) {
  if (threadIdx.x % 32 < 17) __shfl_xor_sync(0xffffu, 1.0f, 1);
}

__global__ void named_lane_elsewhere(float*) {
  if (threadIdx.x % 32 == 3) return;
  __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void two_masks(float*) {
  const bool low = threadIdx.x % 32 < 16;
  __shfl_xor_sync(low ? 0xffffu : kAll, 1.0f, 1);
}

__global__ void two_masks_at_once(float*) {
  __shfl_sync(threadIdx.x % 32 < 16 ? kAll : kAll - 1, 1.0f, 1);
}

__global__ void absent_lane(float*) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void two_operations(float*) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __shfl_sync(kAll, 1.0f, 1);
  }
}

__global__ void misaligned(float* out) {
  if (threadIdx.x == 1) *reinterpret_cast<float4*>(out + 2) = make_float4(1, 2, 3, 4);
}

template <int kWhere>
__global__ void outside(float* out) {
  if (threadIdx.x == 1 && out[kWhere] == 1) out[0] = 0;
}

__global__ void behind_shared(float*) { shared()[1024 / 4 + threadIdx.x] = 1; }

template <bool kMeet, bool kPart>
__global__ void remote(float* out) {
  const auto cluster = cooperative_groups::this_cluster();
  const int other = cluster.block_rank() ^ 1;
  shared()[threadIdx.x] = static_cast<float>(cluster.block_rank());
  float* there = cluster.map_shared_rank(shared(), other);
  if (kMeet) {
    cluster.barrier_arrive();
    cluster.barrier_wait();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = there[threadIdx.x];
  if (kPart) cluster.sync();
}

__global__ void arrives_twice(float*) {
  cooperative_groups::this_cluster().barrier_arrive();
  cooperative_groups::this_cluster().barrier_arrive();
}

__global__ void never_arrives(float*) { cooperative_groups::this_cluster().barrier_wait(); }

// Each block sends its rank to the other, twice over, and reads what it is sent.
template <bool kOpen, bool kExpect, int kSets>
__global__ void mailboxes(float* out) {
  using namespace dafl::cuda;
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = cluster.block_rank();
  auto* boxes = reinterpret_cast<uint64_t*>(shared() + 128);
  if (kOpen && threadIdx.x < 2) mailbox_open(boxes + threadIdx.x);
  cluster.sync();
  for (int turn = 0; turn < 8; ++turn) {
    const int set = turn % kSets;
    float* slots = shared() + 32 * set;
    if (threadIdx.x == 0 && kExpect) mailbox_expect(boxes + set, 2 * sizeof(float));
    if (threadIdx.x % 32 == 0) {
      mailbox_send(slots + threadIdx.x / 32, rank + 10.0f * turn, boxes + set, rank ^ 1);
    }
    mailbox_wait(boxes + set, turn / kSets & 1);
    out[(turn * 2 + blockIdx.x) * 64 + threadIdx.x] = slots[threadIdx.x % 2];
    __syncwarp();  // before lane 0 goes on, and lets the others be sent more
  }
}

template <class T>
const char* launch(void (*kernel)(T*), void* memory, unsigned blocks, unsigned cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{dim3(blocks), dim3(64), 1024, nullptr, &attribute, 1};
  const bool good = cudaLaunchKernelEx(&config, kernel, static_cast<T*>(memory)) == cudaSuccess;
  return good ? nullptr : emulation::message;
}

}  // namespace

extern "C" {

void set_order(uint64_t seed) { emulation::set_order(seed); }

#define KERNEL(name, kernel, blocks, cluster) \
  const char* name(void* memory) { return launch(kernel, memory, blocks, cluster); }
#define ALONE(name) KERNEL(run_##name, name, 1, 1)
ALONE(sums)
ALONE(numbers)
KERNEL(run_turns, turns, 6, 1)
KERNEL(run_turns_cluster, turns, 6, 2)
ALONE(barrier_missing)
ALONE(barrier_skipped)
ALONE(unnamed_lane)
ALONE(named_lane_elsewhere)
ALONE(two_masks)
ALONE(two_masks_at_once)
ALONE(absent_lane)
ALONE(two_operations)
ALONE(misaligned)
KERNEL(run_before, outside<-1>, 1, 1)
KERNEL(run_behind, outside<64>, 1, 1)
ALONE(behind_shared)
KERNEL(run_remote, (remote<true, true>), 4, 2)
KERNEL(run_remote_unmet, (remote<false, true>), 4, 2)
KERNEL(run_remote_left, (remote<true, false>), 4, 2)
KERNEL(run_arrives_twice, arrives_twice, 2, 2)
KERNEL(run_never_arrives, never_arrives, 2, 2)
KERNEL(run_mailboxes, (mailboxes<true, true, 2>), 2, 2)
KERNEL(run_mailboxes_closed, (mailboxes<false, true, 2>), 2, 2)
KERNEL(run_mailboxes_unexpected, (mailboxes<true, false, 2>), 2, 2)
KERNEL(run_mailboxes_one_set, (mailboxes<true, true, 1>), 2, 2)
KERNEL(run_cluster_too_large, sums, 16, 16)
}
