// The launch planner: which kernel handles [N, C] logits on which GPU, and how the rows are cut.
// Plain C++ without CUDA, so it is compiled into every build and tested without a GPU.
//
// Rows are cut into `parts`, consecutive slices whose sums are formed apart and then added in
// order. The cut depends on shape and GPU alone, never on what happens to run where: results are
// the same bits on every run.
//
//   tile     C <= 32: a tile of 128 rows in shared memory, a thread a row. Up to 1024 rows are one
//            cluster of 8 blocks where the GPU has clusters, and then one launch.
//   warp     C <= 1024: a warp a row, 8 rows a block at a time.
//   block    C <= 16384: a block a row.
//   cluster  C <= 131072, where the GPU has clusters: a cluster a row.
//   stream   everything else, and fp64: a block a row that is read more than once.
//
// In warp, block and cluster every thread owns the same columns of all its rows. The generator
// loss holds them in registers.
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
  int threads;      // a block
  int quads;        // groups of 4 columns that a thread owns; 0 where threads own no columns
  int cluster;      // blocks a cluster; 1: no cluster
  bool one_launch;  // losses are finished in the launch that reads the logits
  int64_t parts;    // slices of rows
  int64_t rows;     // a slice; the last may have fewer
  int64_t blocks;   // of the launch that reads the logits
  int64_t shared;   // dynamic shared memory of a block, bytes
  int64_t scratch;  // memory for partial sums, bytes; need not be initialised
};

constexpr int kTileClasses = 32;
constexpr int kTileRows = 128;
constexpr int kTileThreads = 256;
constexpr int kTileCluster = 8;
constexpr int kWarpsPerBlock = 8;
constexpr int kMaxCluster = 8;    // the largest that every GPU with clusters can run
constexpr int kRowsPerSum = 512;  // rows that a running fp32 sum may span
constexpr int kStreamThreads = 256;
constexpr int64_t kStreamScratch = 64 << 20;  // about; below 8 parts a GPU would stand idle
constexpr int kColumnsPerBlock = 32;          // of the kernel that adds the parts

// Every part has the sums of p over its rows [C], then of scalars: the generator loss's, and KL and
// agreeing rows. Behind the parts, the kernel that adds them leaves one number per 32 columns.
constexpr int kPartScalars = kGeneratorSums + 2;

// Shared memory for group reductions: two sets of slots for 16 warps and 8 blocks, 16 bytes each.
constexpr int kSlotBytes = (16 + kMaxCluster) * 16;
constexpr int kReduceBytes = 2 * kSlotBytes;

// A tile row's distance in floats: odd, so that 32 rows' same column lies in 32 banks.
DAFL_HD int tile_pitch(int64_t C) { return static_cast<int>(C) | 1; }

// What a tile kernel keeps beside its tiles, in doubles: its sums, and those of its whole cluster.
constexpr int kTileWidth = kTileClasses + kPartScalars;
constexpr int64_t kTileSums = kTileWidth * (1 + kTileCluster);
// Shared memory of a block that adds parts: 8 slices of 32 columns, in doubles.
constexpr int64_t kAddPartsBytes = 8 * kColumnsPerBlock * 8;

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
inline int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

// N >= 1, C >= 1; f64: the statistics' dtype.
inline Plan make_plan(int64_t N, int64_t C, bool f64, Device device) {
  Plan plan{Regime::stream, kStreamThreads, 0, 1, false, 0, 0, 0, kReduceBytes, 0};
  const bool clusters = device.capability >= 90;
  // Parts that fill the GPU: a block (or cluster) each, all of them running at once. So where rows
  // lie in registers it is as many per multiprocessor as kBlocks of reduce.cuh makes room for.
  int64_t wanted;
  int64_t step = 1;  // parts are multiples of this many rows, but for the last
  int64_t most = N;  // rows a part may have
  if (f64) {
    wanted = 4 * device.multiprocessors;  // 1024 threads each
  } else if (C <= kTileClasses) {
    plan.regime = Regime::tile;
    plan.threads = kTileThreads;
    // Two tiles, since the distillation loss has two inputs.
    plan.shared =
        kReduceBytes + kTileSums * 8 + largest(2 * kTileRows * tile_pitch(C) * 4, kAddPartsBytes);
    plan.one_launch = clusters && N <= kTileCluster * kTileRows;
    plan.cluster = plan.one_launch ? kTileCluster : 1;
    // Two: the second launch then adds half as many sums as with the four that there is room for.
    wanted = plan.one_launch ? kTileCluster : 2 * device.multiprocessors;
    step = plan.one_launch ? 32 : kTileRows;
  } else if (C <= 1024) {
    plan.regime = Regime::warp;
    plan.threads = kWarpsPerBlock * 32;
    plan.quads = C <= 256 ? 2 : 8;
    // Where the warps of a block add their sums of p.
    plan.shared += kWarpsPerBlock * 128 * plan.quads * 4;
    wanted = (plan.quads == 2 ? 4 : 2) * device.multiprocessors;
    step = kWarpsPerBlock;
    most = kRowsPerSum * kWarpsPerBlock;
  } else if (C <= 16384) {
    plan.regime = Regime::block;
    plan.threads = C <= 4096 ? 256 : 512;
    plan.quads = C <= 4096 ? 4 : 8;
    wanted = (C <= 4096 ? 3 : 1) * device.multiprocessors;
    most = kRowsPerSum;
  } else if (clusters && C <= 16384 * kMaxCluster) {
    plan.regime = Regime::cluster;
    plan.threads = 512;
    plan.quads = 8;
    plan.cluster = C <= 2 * 16384 ? 2 : C <= 4 * 16384 ? 4 : 8;
    wanted = largest(device.multiprocessors / plan.cluster, 1);
    most = kRowsPerSum;
  } else {
    wanted = 4 * device.multiprocessors;
  }
  if (plan.regime == Regime::stream) {
    wanted = smallest(wanted, largest(8, kStreamScratch / (8 * (C + kPartScalars))));
  }
  plan.rows = smallest(ceil_div(N, wanted), most);
  plan.rows = ceil_div(plan.rows, step) * step;
  plan.parts = ceil_div(N, plan.rows);
  plan.blocks = plan.parts;
  if (plan.regime == Regime::cluster) plan.blocks = plan.parts * plan.cluster;
  if (plan.one_launch) plan.blocks = kTileCluster;  // the last of them may have no rows
  plan.scratch = 8 * (plan.parts * (C + kPartScalars) + ceil_div(C, kColumnsPerBlock));
  return plan;
}

}  // namespace cuda
}  // namespace dafl
