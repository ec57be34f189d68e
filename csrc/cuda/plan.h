// The launch planner: which kernel handles [N, C] logits on which GPU, and how the rows are cut.
// Plain C++ without CUDA, so it is compiled into every build and tested without a GPU.
//
// Rows are cut into `parts`, consecutive slices whose sums are formed apart and then added in
// order. The cut depends on shape and GPU alone, never on what happens to run where: results are
// the same bits on every run.
//
//   tile     C <= 32: a thread a row. Up to 1024 rows are one cluster of 8 blocks where the GPU has
//            clusters, and then one launch.
//   warp     C <= 1024: a warp a row, or 8 lanes of it up to 256 classes; 8 or 32 rows a block at a
//            time.
//   block    C <= 16384: a block a row.
//   cluster  C <= 131072, where the GPU has clusters: a cluster a row.
//   stream   everything else, and fp64: a block a row that is read more than once.
//
// In warp, block and cluster every thread owns the same 32 columns of all its rows, and holds them
// in registers.
#pragma once

#include <cstdint>

#include "../losses/generator_terms.h"

namespace dafl {
namespace cuda {

enum class Regime { tile, warp, block, cluster, stream };

struct Device {
  int multiprocessors;
  int capability;  // 90 for 9.0: of the GPU, or of the build's code for it if that is less
};

struct Plan {
  Regime regime;
  int threads;              // a block
  int group;                // threads that share a row; 0 where threads own no columns
  int cluster;              // blocks a cluster; 1: no cluster
  bool one_launch;          // losses are finished in the launch that reads the logits
  int64_t parts;            // slices of rows
  int64_t rows;             // a slice; the last may have fewer
  int64_t blocks;           // of the launch that reads the logits
  int64_t backward_blocks;  // of the generator loss's backward launch, which needs no parts
  int64_t shared;           // dynamic shared memory of a block, bytes
  int64_t scratch;          // memory for partial sums, bytes; need not be initialised
};

constexpr int kTileClasses = 32;
constexpr int kTileRows = 128;     // a block of the one launch
constexpr int kTileThreads = 256;  // a block, and its rows at a time, of several launches
constexpr int kTileCluster = 8;
constexpr int kWarpsPerBlock = 8;
constexpr int kOwnColumns = 32;   // of a thread that holds its share of a row in registers
constexpr int kMaxCluster = 8;    // the largest that every GPU with clusters can run
constexpr int kRowsPerSum = 512;  // rows that a running fp32 sum may span
constexpr int kStreamThreads = 256;
constexpr int64_t kStreamScratch = 64 << 20;  // about; below 8 parts a GPU would stand idle
constexpr int kColumnsPerBlock = 32;          // of the kernel that adds the parts

// Every part has the sums of p over its rows [C], then of scalars: the generator loss's, and KL and
// agreeing rows. Behind the parts, the kernel that adds them leaves two numbers per 32 columns.
constexpr int kPartScalars = kGeneratorSums + 2;

// Bytes of a part: C sums in the statistics' dtype, then the scalars in fp64.
DAFL_HD int64_t part_bytes(int64_t C, int64_t size) {
  return (C * size + 7) / 8 * 8 + 8 * kPartScalars;
}

// Shared memory where the warps of a group tell each other values: two sets of slots for 16 warps
// of 8 blocks, 32 bytes each, and the two sets' barriers.
constexpr int kSlots = 16 * kMaxCluster;
constexpr int kSlotBytes = 32;
constexpr int kReduceBytes = 2 * kSlots * kSlotBytes + 16;

// A tile kernel's sums, in doubles: of p and scalars, for each of 16 warps and 8 blocks.
constexpr int kTileWidth = kTileClasses + kPartScalars;
constexpr int64_t kTileBytes = 8 * kTileWidth * (16 + kTileCluster) + 8 + 4 * kTileClasses;
// A block that adds parts, and its shared memory: a double a thread beside the slots.
constexpr int kAddThreads = 256;
constexpr int64_t kAddPartsBytes = kReduceBytes + 8 * kAddThreads;

// A block of the one launch: threads for rows, and others for features beside them, as many as have
// registers for rows of so many classes.
constexpr int one_launch_threads(int64_t C) { return C <= 16 ? 512 : 256; }

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
inline int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

// N >= 1, C >= 1; f64: the statistics' dtype.
inline Plan make_plan(int64_t N, int64_t C, bool f64, Device device) {
  Plan plan{Regime::stream, kStreamThreads, 0, 1, false, 0, 0, 0, 0, kReduceBytes, 0};
  const bool clusters = device.capability >= 90;
  // Parts that fill the GPU: a block (or cluster) each, all of them running at once. So where rows
  // lie in registers it is as many per multiprocessor as those leave room for.
  int64_t wanted;
  int64_t step = 1;          // parts are multiples of this many rows, but for the last
  int64_t most = N;          // rows a part may have
  int64_t rows_at_once = 1;  // of a block or cluster
  if (f64) {
    wanted = 4 * device.multiprocessors;  // 1024 threads each
  } else if (C <= kTileClasses) {
    plan.regime = Regime::tile;
    plan.shared = kTileBytes + kReduceBytes;
    plan.one_launch = clusters && N <= kTileCluster * kTileRows;
    plan.threads = plan.one_launch ? one_launch_threads(C) : kTileThreads;
    plan.cluster = plan.one_launch ? kTileCluster : 1;
    // Two: the second launch then adds half as many sums as with the four that there is room for.
    wanted = plan.one_launch ? kTileCluster : 2 * device.multiprocessors;
    step = 32;
    most = kRowsPerSum * kTileThreads;
  } else if (C <= 1024) {
    plan.regime = Regime::warp;
    plan.threads = kWarpsPerBlock * 32;
    plan.group = C <= 256 ? 8 : 32;
    rows_at_once = plan.threads / plan.group;
    // Where the groups of a block add their sums of p.
    plan.shared += rows_at_once * plan.group * kOwnColumns * 4;
    wanted = 2 * device.multiprocessors;
    step = rows_at_once;
    most = kRowsPerSum * rows_at_once;
  } else if (C <= 16384) {
    plan.regime = Regime::block;
    plan.threads = C <= 4096 ? 128 : 512;
    plan.group = plan.threads;
    wanted = (C <= 4096 ? 4 : 1) * device.multiprocessors;
    most = kRowsPerSum;
  } else if (clusters && C <= 16384 * kMaxCluster) {
    plan.regime = Regime::cluster;
    plan.threads = 512;
    plan.group = plan.threads;
    plan.cluster = C <= 2 * 16384 ? 2 : C <= 4 * 16384 ? 4 : 8;
    // How many clusters run at once differs between GPUs of one kind. So there are several times as
    // many parts, and none waits for long.
    wanted = 6 * largest(device.multiprocessors / plan.cluster, 1);
    most = kRowsPerSum;
  } else {
    wanted = 4 * device.multiprocessors;
  }
  if (plan.regime == Regime::stream) {
    wanted = smallest(wanted, largest(8, kStreamScratch / part_bytes(C, f64 ? 8 : 4)));
  }
  plan.rows = smallest(ceil_div(N, wanted), most);
  plan.rows = ceil_div(plan.rows, step) * step;
  plan.parts = ceil_div(N, plan.rows);
  plan.blocks = plan.parts * (plan.regime == Regime::cluster ? plan.cluster : 1);
  if (plan.one_launch) plan.blocks = kTileCluster;  // the last of them may have no rows
  // The backward launch has a row after the other for every block, or cluster.
  // Where rows are few, the features may not be.
  if (plan.regime == Regime::tile) {
    plan.backward_blocks = 4 * device.multiprocessors;
  } else if (plan.regime == Regime::cluster) {
    plan.backward_blocks = smallest(N, wanted) * plan.cluster;
  } else {
    plan.backward_blocks = smallest(ceil_div(N, rows_at_once), wanted);
  }
  plan.scratch = plan.parts * part_bytes(C, f64 ? 8 : 4) + 16 * ceil_div(C, kColumnsPerBlock);
  return plan;
}

}  // namespace cuda
}  // namespace dafl
