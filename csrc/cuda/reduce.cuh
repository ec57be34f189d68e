// What the kernels are made of: loads and stores of any dtype, sums and maxima in fixed order over
// a warp, a block or a cluster, the activation loss.
//
// Order is fixed everywhere: a warp's butterfly adds the same pairs in every lane, and what crosses
// warps, blocks or launches is written to memory and added by index. No atomics, so the same bits
// on every run.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../matrix.h"
#include "../row_math.h"
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

constexpr int kWarp = 32;

__device__ inline float lowest(float) { return -__builtin_huge_valf(); }
__device__ inline double lowest(double) { return -__builtin_huge_val(); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

template <class S>
__device__ S log_or_zero(S p) {
  return p == S(0) ? S(0) : log_of(p);
}

__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }

// 1 / x within 2 ulp, for 1 <= x < 2^126 and NaN: sums of exponentials. It needs no call to a slow
// path, around which registers would spill.
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }

// The compiler takes the value for a new one, and orders memory accesses around it: what it would
// otherwise share between loops or load ahead, all at once, does not fit the registers.
__device__ inline void keep_apart(float& value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(value)::"memory");
#else
  (void)value;
#endif
}

// The block's dynamic shared memory; plan.h says how much there is.
__device__ inline char* block_shared() {
  extern __shared__ __align__(16) char dafl_shared[];
  return dafl_shared;
}

// ---- Memory ------------------------------------------------------------------------------------

__device__ inline float decode16(unsigned short bits, Dtype dtype) {
  return dtype == Dtype::bf16 ? __uint_as_float(static_cast<unsigned>(bits) << 16)
                              : __half2float(__ushort_as_half(bits));
}

__device__ inline unsigned short encode16(float value, Dtype dtype) {
  return dtype == Dtype::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                              : __half_as_ushort(__float2half_rn(value));
}

// One element, at an offset in elements.
template <class S>
__device__ S load(const void* data, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<S>(static_cast<const float*>(data)[offset]);
    case Dtype::f64:
      return static_cast<S>(static_cast<const double*>(data)[offset]);
    default:
      return static_cast<S>(decode16(static_cast<const unsigned short*>(data)[offset], dtype));
  }
}

template <class S>
__device__ S load(const Matrix& m, int64_t row, int64_t column) {
  return load<S>(m.data, m.dtype, row * m.row_stride + column * m.col_stride);
}

template <class S>
__device__ void store(void* data, Dtype dtype, int64_t offset, S value) {
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      break;
    case Dtype::f64:
      static_cast<double*>(data)[offset] = value;
      break;
    default:
      static_cast<unsigned short*>(data)[offset] = encode16(static_cast<float>(value), dtype);
  }
}

// Whether `width` columns can be read in aligned fours: 16 bytes of fp32, 8 of bf16 or fp16.
__device__ inline bool has_quads(const Matrix& m, int64_t width) {
  const int64_t bytes = m.dtype == Dtype::f32 ? 16 : 8;
  return m.dtype != Dtype::f64 && m.col_stride == 1 && width % 4 == 0 && m.row_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % bytes == 0;
}

// Four elements at an offset that has_quads vouches for.
__device__ inline float4 load_quad(const void* data, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::f32) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + offset);
  }
  const ushort4 bits =
      *reinterpret_cast<const ushort4*>(static_cast<const unsigned short*>(data) + offset);
  return make_float4(decode16(bits.x, dtype), decode16(bits.y, dtype), decode16(bits.z, dtype),
                     decode16(bits.w, dtype));
}

__device__ inline void store_quad(void* data, Dtype dtype, int64_t offset, float4 v) {
  if (dtype == Dtype::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + offset) = v;
  } else {
    *reinterpret_cast<ushort4*>(static_cast<unsigned short*>(data) + offset) = make_ushort4(
        encode16(v.x, dtype), encode16(v.y, dtype), encode16(v.z, dtype), encode16(v.w, dtype));
  }
}

// A row in registers. A thread owns the columns first + 4 q kGroup + j, q < kQuads, j < 4, of
// those below `limit`; first is a multiple of 4, and neighbours' quads are neighbours.
template <int kGroup>
__device__ constexpr int column_of(int i, int first) {
  return first + i / 4 * (4 * kGroup) + i % 4;
}

struct Columns {
  int first, limit;
};

// Columns from the limit on read as -inf, which no maximum and no sum of exponentials sees. One
// dtype's loads stand together, so that all of them are under way before the first is used.
template <int kGroup, int kQuads>
__device__ void load_row(const Matrix& m, bool quads, int64_t row, Columns own,
                         float (&x)[4 * kQuads]) {
  const int64_t start = row * m.row_stride;
  if (quads && m.dtype == Dtype::f32) {
    const float* from = static_cast<const float*>(m.data) + start;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int column = column_of<kGroup>(4 * q, own.first);
      const float low = lowest(0.0f);
      float4 v = make_float4(low, low, low, low);
      if (column < own.limit) v = *reinterpret_cast<const float4*>(from + column);
      x[4 * q] = v.x;
      x[4 * q + 1] = v.y;
      x[4 * q + 2] = v.z;
      x[4 * q + 3] = v.w;
    }
  } else if (quads) {
    const unsigned short* from = static_cast<const unsigned short*>(m.data) + start;
    ushort4 bits[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int column = column_of<kGroup>(4 * q, own.first);
      bits[q] = make_ushort4(0, 0, 0, 0);
      if (column < own.limit) bits[q] = *reinterpret_cast<const ushort4*>(from + column);
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const bool in = column_of<kGroup>(4 * q, own.first) < own.limit;
      x[4 * q] = in ? decode16(bits[q].x, m.dtype) : lowest(0.0f);
      x[4 * q + 1] = in ? decode16(bits[q].y, m.dtype) : lowest(0.0f);
      x[4 * q + 2] = in ? decode16(bits[q].z, m.dtype) : lowest(0.0f);
      x[4 * q + 3] = in ? decode16(bits[q].w, m.dtype) : lowest(0.0f);
    }
  } else {
    // Any strides. One element after the other: addresses for all would not fit the registers.
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) {
      const int column = column_of<kGroup>(i, own.first);
      const int64_t offset = start + column * m.col_stride;
      x[i] = column < own.limit ? load<float>(m.data, m.dtype, offset) : lowest(0.0f);
      keep_apart(x[i]);
    }
  }
}

// Asks for a row that load_row will read next: it travels to the L2 cache while the current one is
// worked on, without taking registers.
template <int kGroup, int kQuads>
__device__ void prefetch_row(const Matrix& m, bool quads, int64_t row, Columns own) {
#ifdef __CUDA_ARCH__
  if (!quads) return;
  const char* from = static_cast<const char*>(m.data);
  const int size = m.dtype == Dtype::f32 ? 4 : 2;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int column = column_of<kGroup>(4 * q, own.first);
    const char* at = from + (row * m.row_stride + column) * size;
    if (column < own.limit) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
  }
#endif
}

// Into a contiguous [N, C] gradient.
template <int kGroup, int kQuads>
__device__ void store_row(void* grad, Dtype dtype, int64_t row, int C, Columns own,
                          const float (&x)[4 * kQuads]) {
  const int64_t start = row * C;
  const bool quads = C % 4 == 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int column = column_of<kGroup>(4 * q, own.first);
    if (quads) {
      if (column < own.limit) {
        store_quad(grad, dtype, start + column,
                   make_float4(x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < own.limit) store(grad, dtype, start + column + j, x[4 * q + j]);
      }
    }
  }
}

// ---- Reductions --------------------------------------------------------------------------------

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Pair {
  float a, b;
};

struct AddPairs {
  __device__ Pair operator()(Pair x, Pair y) const { return {x.a + y.a, x.b + y.b}; }
};

// A maximum and the lowest index that reaches it. A NaN is passed over here and met by the sums
// that follow.
template <class S>
struct Best {
  S value;
  int index;
};

struct Better {
  template <class S>
  __device__ Best<S> operator()(Best<S> a, Best<S> b) const {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }
};

struct BestPair {
  Best<float> a, b;
};

struct BetterPairs {
  __device__ BestPair operator()(BestPair x, BestPair y) const {
    return {Better()(x.a, y.a), Better()(x.b, y.b)};
  }
};

template <class T, class Op>
__device__ T warp_reduce(T value, Op op) {
  static_assert(sizeof(T) % 4 == 0, "shuffled by words");
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    unsigned words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (unsigned i = 0; i < sizeof(T) / 4; ++i) {
      words[i] = __shfl_xor_sync(0xffffffffu, words[i], mask);
    }
    T other;
    memcpy(&other, words, sizeof(T));
    value = op(value, other);
  }
  return value;
}

// The threads that work on one row: a warp, a block, or the blocks of a cluster. `reduce` gives
// every one of them the same bits; all of them must call it together.
//
// Two sets of slots in shared memory take turns, so that one barrier a reduction is enough: who
// writes a set again has passed the barrier of the reduction between, and that barrier is passed
// only by threads that have done reading the set before.
template <int kThreads, bool kCluster>
struct Group {
  int thread;  // in the group
  char* slots;
  int turn = 0;

  __device__ explicit Group(char* shared) : slots(shared) {
    thread = threadIdx.x % kThreads;
#if DAFL_CLUSTERS
    if constexpr (kCluster) {
      const auto cluster = cooperative_groups::this_cluster();
      thread += cluster.block_rank() * kThreads;
      // No block may write to another's shared memory before that one runs. Afterwards none can
      // leave too early: its last reduction's barrier comes after all writes to it.
      cluster.sync();
    }
#endif
  }

  template <class T, class Op>
  __device__ T reduce(T value, Op op) {
    static_assert(sizeof(T) <= 16 && kThreads <= 512, "kSlotBytes");
    value = warp_reduce(value, op);
    if constexpr (kThreads > kWarp) {
      constexpr int kWarps = kThreads / kWarp;
      T* own = reinterpret_cast<T*>(slots + turn * kSlotBytes);
      turn ^= 1;
      if (threadIdx.x % kWarp == 0) own[threadIdx.x / kWarp] = value;
      __syncthreads();
      value = own[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) value = op(value, own[w]);
#if DAFL_CLUSTERS
      if constexpr (kCluster) {
        // Every block tells every block, then all read their own memory.
        const auto cluster = cooperative_groups::this_cluster();
        const unsigned blocks = cluster.num_blocks();
        T* ranks = own + kWarps;
        if (threadIdx.x < blocks) {
          cluster.map_shared_rank(ranks, threadIdx.x)[cluster.block_rank()] = value;
        }
        cluster.sync();
        value = ranks[0];
        for (unsigned r = 1; r < blocks; ++r) value = op(value, ranks[r]);
      }
#endif
    }
    return value;
  }

  template <class T>
  __device__ T sum(T value) {
    return reduce(value, Add());
  }
};

// The sum of one column over all parts, in a block of 256 threads whose lanes stand for 32
// columns: each warp adds every 8th part, then all add the 8 sums. `column` < 0: nothing to add.
__device__ inline double add_parts(const double* parts, int64_t count, int64_t width,
                                   int64_t column, double* shared) {
  const int lane = threadIdx.x % kWarp;
  double sum = 0;
  if (column >= 0) {
#pragma unroll 8
    for (int64_t p = threadIdx.x / kWarp; p < count; p += 8) sum += parts[p * width + column];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = shared[lane];
#pragma unroll
  for (int slice = 1; slice < 8; ++slice) sum += shared[slice * kWarp + lane];
  __syncthreads();  // before the next call overwrites
  return sum;
}

// ---- Activation loss ---------------------------------------------------------------------------

// f(i, quad) or f(i, value) over this block's share of the N * F features; i: index in [N, F].
// The share is cut by the grid, in fours, whatever the rows' own partition is.
template <class Quad, class Single>
__device__ void for_features(const Matrix& features, int64_t N, int64_t F, Quad quad,
                             Single single) {
  const int64_t total = N * F;
  const int64_t share = (total + 4 * static_cast<int64_t>(gridDim.x) - 1) / (4 * gridDim.x) * 4;
  const int64_t begin = share * blockIdx.x;
  const int64_t end = begin + share < total ? begin + share : total;
  const Matrix flat{features.data, 0, features.col_stride, features.dtype};
  if (features.row_stride == F && has_quads(flat, total)) {
#pragma unroll 4
    for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * blockDim.x) {
      quad(i, load_quad(features.data, features.dtype, i));
    }
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      single(i, load<double>(features, i / F, i % F));
    }
  }
}

// This thread's part of the sum of |f|: quads in fp32, 256 elements at most, then in fp64.
__device__ inline double abs_sum(const Matrix& features, int64_t N, int64_t F) {
  double sum = 0;
  float piece = 0;
  int count = 0;
  for_features(
      features, N, F,
      [&](int64_t, float4 v) {
        piece += (fabsf(v.x) + fabsf(v.y)) + (fabsf(v.z) + fabsf(v.w));
        if (++count % 64 == 0) {
          sum += piece;
          piece = 0;
        }
      },
      [&](int64_t, double v) { sum += fabs(v); });
  return sum + piece;
}

__device__ inline double signed_like(double value, double x) {
  return x > 0 ? value : (x < 0 ? -value : 0.0);
}

// grad = value * sign(f)
__device__ inline void sign_gradient(const Matrix& features, int64_t N, int64_t F, double value,
                                     void* grad) {
  const float up = static_cast<float>(value);
  const Dtype dtype = features.dtype;
  for_features(
      features, N, F,
      [&](int64_t i, float4 v) {
        const auto sign = [&](float x) { return x > 0 ? up : (x < 0 ? -up : 0.0f); };
        store_quad(grad, dtype, i, make_float4(sign(v.x), sign(v.y), sign(v.z), sign(v.w)));
      },
      [&](int64_t i, double x) { store(grad, dtype, i, signed_like(value, x)); });
}

// ---- Tiles: up to 32 classes, a thread a row ---------------------------------------------------

// A tile kernel's shared memory, as plan.h counts it.
struct TileShared {
  double* sums;      // [kTileWidth], this block's
  double* gathered;  // [kTileCluster][kTileWidth], all blocks' of the cluster
  float* first;      // [kTileRows][pitch]
  float* second;     // the same for the distillation loss
  double* scratch;   // for add_parts, over the tiles

  __device__ TileShared(char* shared, int pitch) {
    sums = reinterpret_cast<double*>(shared + kReduceBytes);
    gathered = sums + kTileWidth;
    first = reinterpret_cast<float*>(sums + kTileSums);
    second = first + kTileRows * pitch;
    scratch = sums + kTileSums;
  }
};

// `rows` rows from `row` on: consecutive threads read consecutive elements.
__device__ inline void load_tile(const Matrix& m, int64_t row, int rows, int C, float* tile) {
  const int pitch = tile_pitch(C);
  const int64_t start = row * m.row_stride;
#pragma unroll 4
  for (int e = threadIdx.x; e < rows * C; e += blockDim.x) {
    const int r = e / C, k = e - r * C;
    tile[r * pitch + k] = load<float>(m.data, m.dtype, start + r * m.row_stride + k * m.col_stride);
  }
}

__device__ inline void store_tile(void* grad, Dtype dtype, int64_t row, int rows, int C,
                                  const float* tile) {
  const int pitch = tile_pitch(C);
  for (int e = threadIdx.x; e < rows * C; e += blockDim.x) {
    const int r = e / C, k = e - r * C;
    store(grad, dtype, row * C + e, tile[r * pitch + k]);
  }
}

// sums[k] += the tile's column k. A warp a column; 4 rows a lane, then a tree over the lanes.
__device__ inline void add_columns(const float* tile, int rows, int C, double* sums) {
  const int pitch = tile_pitch(C), lane = threadIdx.x % kWarp;
  for (int k = threadIdx.x / kWarp; k < C; k += kTileThreads / kWarp) {
    float sum = 0;
#pragma unroll
    for (int r = lane; r < kTileRows; r += kWarp) {
      if (r < rows) sum += tile[r * pitch + k];
    }
    sum = warp_reduce(sum, Add());
    if (lane == 0) sums[k] += static_cast<double>(sum);
  }
}

// Maximum and lowest-index argmax of a row that one thread owns.
__device__ inline Best<float> row_best(const float* x, int C) {
  Best<float> best{x[0], 0};
  for (int k = 1; k < C; ++k) {
    if (x[k] > best.value) best = {x[k], k};
  }
  return best;
}

// The cluster's sums, added in the order of its blocks: for the one-launch kernels. All threads of
// all blocks call it once, after `sums` is complete and the blocks have met before.
__device__ inline void gather_sums(const TileShared& shared, int width) {
#if DAFL_CLUSTERS
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  for (int i = threadIdx.x; i < blocks * kTileWidth; i += blockDim.x) {
    const int to = i / kTileWidth, k = i % kTileWidth;
    double* remote = cluster.map_shared_rank(shared.gathered, to);
    if (k < width) remote[rank * kTileWidth + k] = shared.sums[k];
  }
  cluster.sync();  // every block has written to every block
#endif
}

__device__ inline double gathered_sum(const TileShared& shared, int k) {
  double sum = shared.gathered[k];
  for (int r = 1; r < kTileCluster; ++r) sum += shared.gathered[r * kTileWidth + k];
  return sum;
}

// Before gather_sums: no block may write to one that does not run yet.
__device__ inline void meet_cluster() {
#if DAFL_CLUSTERS
  cooperative_groups::this_cluster().sync();
#endif
}

// ---- Launching ---------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int cluster,
                   int64_t shared, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

// The kernels that hold a row in registers: how many threads share it, how many quads each owns,
// and the blocks that a multiprocessor should have room for.
template <int kGroup_, int kQuads_, bool kCluster_, int kBlocks_>
struct Rows {
  static constexpr int kGroup = kGroup_;
  static constexpr int kQuads = kQuads_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = kGroup == kWarp ? kWarpsPerBlock * kWarp : kGroup;
  static constexpr int kGroups = kThreads / kGroup;  // rows that a block has at a time
  static constexpr int kValues = 4 * kQuads;
};

// Part `part` of plan.h: its rows go to the block's (or the cluster's) groups in turn, and each
// row's columns to the group's threads, first in equal shares to the cluster's blocks.
template <class R>
struct PartOfRows {
  int64_t part, first, end;
  Columns own;

  __device__ PartOfRows(int64_t N, int C, int64_t part_rows) {
    part = blockIdx.x;
    own = {static_cast<int>(threadIdx.x % R::kGroup) * 4, C};
#if DAFL_CLUSTERS
    if constexpr (R::kCluster) {
      const auto cluster = cooperative_groups::this_cluster();
      const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
      const int share = ((C + 3) / 4 + blocks - 1) / blocks * 4;
      part /= blocks;
      own.first += rank * share;
      own.limit = min(C, (rank + 1) * share);
    }
#endif
    first = part * part_rows + threadIdx.x / R::kGroup;
    end = min(N, (part + 1) * part_rows);
  }
};

// call(Rows<...>) with the plan's.
template <class Call>
cudaError_t with_rows(const Plan& plan, Call call) {
  if (plan.regime == Regime::warp) {
    return plan.quads == 2 ? call(Rows<kWarp, 2, false, 4>()) : call(Rows<kWarp, 8, false, 2>());
  }
  if (plan.regime == Regime::block) {
    return plan.quads == 4 ? call(Rows<256, 4, false, 3>()) : call(Rows<512, 8, false, 1>());
  }
  return call(Rows<512, 8, true, 1>());
}

}  // namespace cuda
}  // namespace dafl
