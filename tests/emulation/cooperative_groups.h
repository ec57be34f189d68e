#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return emulation::current->block; }
  static unsigned num_blocks() { return emulation::blocks; }
  static void sync() { emulation::wait(emulation::kCluster); }
  template <class T>
  static T* map_shared_rank(T* address, int rank) {
    char* at = reinterpret_cast<char*>(address);
    if (rank == emulation::resident) return address;
    return reinterpret_cast<T*>(emulation::shared[rank].data() + (at - emulation::dafl_shared));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
