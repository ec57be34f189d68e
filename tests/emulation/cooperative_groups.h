#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  struct arrival_token {};
  static unsigned block_rank() { return emulation::current->block; }
  static unsigned num_blocks() { return emulation::blocks; }
  static arrival_token barrier_arrive() {
    emulation::arrive_at_cluster();
    return {};
  }
  static void barrier_wait() { emulation::wait_for_cluster(); }
  static void barrier_wait(arrival_token&&) { emulation::wait_for_cluster(); }
  static void sync() {
    barrier_arrive();
    barrier_wait();
  }
  // A pointer to a locked page while the block does not run.
  template <class T>
  static T* map_shared_rank(T* address, int rank) {
    using namespace emulation;
    const int64_t offset = reinterpret_cast<char*>(address) - dafl_shared;
    if (rank < 0 || rank >= static_cast<int>(blocks)) fail("maps a block that the cluster lacks");
    if (offset < 0 || offset >= static_cast<int64_t>(used)) fail("maps what is no shared memory");
    if (rank == resident) return address;
    return reinterpret_cast<T*>(windows + rank * kWindow + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

// What csrc/cuda/reduce.cuh declares for the host: on a GPU these are mbarriers and asynchronous
// stores.
namespace dafl {
namespace cuda {

inline int64_t mailbox_offset(uint64_t* box) {
  return reinterpret_cast<char*>(box) - emulation::dafl_shared;
}
inline void mailbox_open(uint64_t* box) {
  const emulation::Mailbox empty{};
  memcpy(box, &empty, sizeof empty);
}
inline void mailbox_expect(uint64_t* box, int bytes) {
  emulation::change_mailbox(emulation::current->block, mailbox_offset(box), bytes, true);
}
template <class V>
void mailbox_send(V* to, const V& value, uint64_t* box, int rank) {
  const auto cluster = cooperative_groups::this_cluster();
  memcpy(cluster.map_shared_rank(to, rank), &value, sizeof(V));
  emulation::change_mailbox(rank, mailbox_offset(box), -static_cast<int>(sizeof(V)), false);
}
inline void mailbox_wait(uint64_t* box, unsigned phase) {
  emulation::wait_for_mailbox(mailbox_offset(box), phase);
}

}  // namespace cuda
}  // namespace dafl
