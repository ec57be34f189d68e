// The CPU kernels, compiled once per instruction set: losses_{baseline,avx2,avx512}.cpp define
// DAFL_ISA (a namespace) and DAFL_VECTOR_BYTES and include this file. Vectors are the compilers'
// own (GCC and Clang `vector_size`), so there are no intrinsics.
//
// Two regimes. C <= 32: a lane is a row; tiles of `lanes` rows are transposed into a [C][lanes]
// scratch, and no operation crosses lanes. C > 32: a lane is a column; contiguous fp32 rows are
// read in place, all others are converted into scratch first.
//
// This file may not use anything from the standard library: an inline function or template
// compiled here with wide instructions could be the copy that the linker keeps for everybody.

#include "vectors.inl"

namespace dafl {
namespace cpu {
namespace DAFL_ISA {
namespace {

// ---- Elementary functions ----------------------------------------------------------------------

struct FloatMath {
  using Scalar = float;
  using Value = F32;
  static constexpr int lanes = DAFL_VECTOR_BYTES / 4;

  // exp(x) for x <= 0 as 2^n 2^f with |f| <= 1/2: a degree-5 polynomial in f (9e-8), 2^n through
  // the exponent bits. 0 below the smallest normal number, NaN for NaN, exactly 1 for 0.
  static DAFL_HD F32 exp(F32 x) {
#ifdef DAFL_AVX512_INTRINSICS
    // Masked forms, all lanes on: GCC 12 warns about its own header in the plain ones.
    F32 n = _mm512_maskz_roundscale_ps(0xffff, x * 1.44269504f,
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    F32 shifted = x * 1.44269504f + 12582912.0f;  // n in the low bits of the mantissa
    F32 n = shifted - 12582912.0f;
#endif
    F32 f = x * 1.44269504f - n;  // one rounding where there is FMA
    F32 series = f * 1.326472731e-3f + 9.671512991e-3f;
    series = series * f + 5.550733581e-2f;
    series = series * f + 2.402224243e-1f;
    series = series * f + 6.931470037e-1f;
    series = series * f + 1.0f;
#ifdef DAFL_AVX512_INTRINSICS
    return _mm512_maskz_scalef_ps(0xffff, series, n);  // by itself 0 for -inf and in underflow
#else
    F32 result = series * bit_cast<F32>((bit_cast<U32>(shifted) + 127u) << 23);
    return x < -87.336544f ? F32{} : result;
#endif
  }

  static DAFL_HD F32 abs(F32 x) { return bit_cast<F32>(bit_cast<U32>(x) & 0x7fffffffu); }

  // log(u) for u >= 1; inf and NaN stay what they are.
  static DAFL_HD F32 log(F32 u) {
    I32 bits = bit_cast<I32>(u);
    I32 exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
    F32 z = bit_cast<F32>(bits - (exponent << 23)) - 1.0f;
    F32 e = __builtin_convertvector(exponent, F32);
    F32 series = z * 7.0376836292e-2f + -1.1514610310e-1f;
    series = series * z + 1.1676998740e-1f;
    series = series * z + -1.2420140846e-1f;
    series = series * z + 1.4249322787e-1f;
    series = series * z + -1.6668057665e-1f;
    series = series * z + 2.0000714765e-1f;
    series = series * z + -2.4999993993e-1f;
    series = series * z + 3.3333331174e-1f;
    F32 zz = z * z;
    F32 tail = series * (zz * z) + e * -2.12194440e-4f - zz * 0.5f;
    F32 result = (z + tail) + e * 0.693359375f;
    return u < __builtin_inff() ? result : u;
  }

  // Elements of a strided source, fp32 or narrower, to dst[i * dst_stride].
  static DAFL_HD void gather(const Matrix& source, int64_t row, int64_t count, float* dst,
                             int64_t dst_stride) {
    int64_t step = source.col_stride;
    uint32_t* bits = reinterpret_cast<uint32_t*>(dst);
    if (source.dtype == Dtype::f32) {
      const uint32_t* from = static_cast<const uint32_t*>(source.data) + row * source.row_stride;
      for (int64_t i = 0; i < count; ++i) bits[i * dst_stride] = from[i * step];
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(source.data) + row * source.row_stride;
      if (step == 1 && dst_stride == 1) {
        for (int64_t i = 0; i < count; ++i) bits[i] = from[i];
      } else {
        for (int64_t i = 0; i < count; ++i) bits[i * dst_stride] = from[i * step];
      }
    }
  }

  // What gather left as bits becomes numbers, in place. `count` may be rounded up to whole vectors.
  static DAFL_HD void decode(Dtype dtype, float* values, int64_t count) {
    if (dtype == Dtype::f32) return;
    for (int64_t i = 0; i < count; i += lanes) {
      U32 bits;
      __builtin_memcpy(&bits, values + i, sizeof bits);
      F32 value = dtype == Dtype::bf16 ? decode_bf16<F32>(bits) : decode_f16<F32>(bits);
      __builtin_memcpy(values + i, &value, sizeof value);
    }
  }

  // The way back: numbers to bits in place, then bits to memory.
  static DAFL_HD void encode(Dtype dtype, float* values, int64_t count) {
    if (dtype == Dtype::f32) return;
    for (int64_t i = 0; i < count; i += lanes) {
      F32 value;
      __builtin_memcpy(&value, values + i, sizeof value);
      U32 bits = dtype == Dtype::bf16 ? encode_bf16<F32, U32>(value) : encode_f16<F32, U32>(value);
      __builtin_memcpy(values + i, &bits, sizeof bits);
    }
  }

  static DAFL_HD void scatter(Dtype dtype, const float* values, int64_t stride, int64_t count,
                              void* dst, int64_t offset) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(values);
    if (dtype == Dtype::f32) {
      uint32_t* to = static_cast<uint32_t*>(dst) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = bits[i * stride];
    } else {
      uint16_t* to = static_cast<uint16_t*>(dst) + offset;
      if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint16_t>(bits[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint16_t>(bits[i * stride]);
      }
    }
  }

  static DAFL_HD bool in_place(Dtype dtype) { return dtype == Dtype::f32; }

  // A full tile of contiguous fp32 rows, by whole vectors. They reach past the end of a row, so
  // this refuses (and leaves the work to gather) where they would reach past the last one's.
  static DAFL_HD bool load_tile(const Matrix& source, int64_t row, int64_t N, int64_t C,
                                F32* tile) {
    const int64_t stride = source.row_stride, padded = (C + lanes - 1) / lanes * lanes;
    if (source.dtype != Dtype::f32 || source.col_stride != 1 || stride < C) return false;
    if ((row + lanes - 1) * stride + padded > (N - 1) * stride + C) return false;
    const float* from = static_cast<const float*>(source.data) + row * stride;
    for (int64_t k = 0; k < C; k += lanes) {
      F32 block[lanes];
      for (int i = 0; i < lanes; ++i) {
        __builtin_memcpy(&block[i], from + i * stride + k, sizeof(F32));
      }
      transpose(block);
      for (int i = 0; i < lanes; ++i) tile[k + i] = block[i];
    }
    return true;
  }

  // The way back. A vector that reaches past the end of its row is overwritten by the next row's;
  // at the end of the tile, where there is none, rows are written element by element.
  static DAFL_HD void store_tile(F32* tile, int64_t row, int64_t C, float* grad) {
    const int64_t padded = (C + lanes - 1) / lanes * lanes;
    for (int64_t k = 0; k < padded; k += lanes) transpose(tile + k);
    float* to = grad + row * C;
    for (int64_t i = 0; i < lanes; ++i) {
      const bool fits = i * C + padded <= lanes * C;
      for (int64_t k = 0; k < C; k += lanes) {
        const F32 values = tile[k + i];
        if (fits) {
          __builtin_memcpy(to + i * C + k, &values, sizeof values);
        } else {
          for (int64_t j = 0; j < min_of(lanes, C - k); ++j) to[i * C + k + j] = values[j];
        }
      }
    }
  }
};

#ifdef DAFL_WITH_F64
// The exact path: fp64 logits, with the other operands of any dtype. Built into the baseline only.
struct DoubleMath {
  using Scalar = double;
  using Value = F64;
  static constexpr int lanes = DAFL_VECTOR_BYTES / 8;

  static DAFL_HD F64 exp(F64 x) {
    for (int i = 0; i < lanes; ++i) x[i] = __builtin_exp(x[i]);
    return x;
  }

  static DAFL_HD F64 abs(F64 x) { return x < 0.0 ? -x : x; }

  static DAFL_HD F64 log(F64 u) {
    for (int i = 0; i < lanes; ++i) u[i] = __builtin_log(u[i]);
    return u;
  }

  static void gather(const Matrix& source, int64_t row, int64_t count, double* dst,
                     int64_t dst_stride) {
    int64_t start = row * source.row_stride;
    for (int64_t i = 0; i < count; ++i) {
      int64_t at = start + i * source.col_stride;
      double value;
      if (source.dtype == Dtype::f64) {
        value = static_cast<const double*>(source.data)[at];
      } else if (source.dtype == Dtype::f32) {
        value = static_cast<const float*>(source.data)[at];
      } else {
        uint32_t bits = static_cast<const uint16_t*>(source.data)[at];
        value = source.dtype == Dtype::bf16 ? decode_bf16<float>(bits) : decode_f16<float>(bits);
      }
      dst[i * dst_stride] = value;
    }
  }

  static DAFL_HD void decode(Dtype, double*, int64_t) {}
  static DAFL_HD void encode(Dtype, double*, int64_t) {}

  static void scatter(Dtype dtype, const double* values, int64_t stride, int64_t count, void* dst,
                      int64_t offset) {
    for (int64_t i = 0; i < count; ++i) {
      double value = values[i * stride];
      float rounded = static_cast<float>(value);
      if (dtype == Dtype::f64) {
        static_cast<double*>(dst)[offset + i] = value;
      } else if (dtype == Dtype::f32) {
        static_cast<float*>(dst)[offset + i] = rounded;
      } else {
        uint32_t bits = dtype == Dtype::bf16 ? encode_bf16<float, uint32_t>(rounded)
                                             : encode_f16<float, uint32_t>(rounded);
        static_cast<uint16_t*>(dst)[offset + i] = static_cast<uint16_t>(bits);
      }
    }
  }

  static DAFL_HD bool in_place(Dtype dtype) { return dtype == Dtype::f64; }
  static DAFL_HD bool load_tile(const Matrix&, int64_t, int64_t, int64_t, F64*) { return false; }
  static DAFL_HD void store_tile(F64*, int64_t, int64_t, float*) {}
};
#endif

// ---- Vectors and memory ------------------------------------------------------------------------

template <class M>
struct Ops {
  using S = typename M::Scalar;
  using V = typename M::Value;
  static constexpr int L = M::lanes;

  static DAFL_HD V splat(S x) { return x - V{}; }

  static DAFL_HD V iota() {
    V v;
    for (int i = 0; i < L; ++i) v[i] = static_cast<S>(i);
    return v;
  }

  static DAFL_HD V load(const S* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }

  // The first `count` elements, `fill` after them.
  static DAFL_HD V load(const S* from, int64_t count, S fill) {
    if (count >= L) return load(from);
    V v = splat(fill);
    for (int64_t i = 0; i < count; ++i) v[i] = from[i];
    return v;
  }

  static DAFL_HD void store(S* to, V v) { __builtin_memcpy(to, &v, sizeof v); }

  static DAFL_HD void store(S* to, int64_t count, V v) {
    if (count >= L) return store(to, v);
    for (int64_t i = 0; i < count; ++i) to[i] = v[i];
  }

  // Across lanes, as a tree: short chains, and the same order on every run.
  template <class Combine>
  static DAFL_HD S across(V v, Combine combine) {
    S lane[L];
    __builtin_memcpy(lane, &v, sizeof lane);
    for (int width = L / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] = combine(lane[i], lane[i + width]);
    }
    return lane[0];
  }

  static DAFL_HD S sum(V v) {
    return across(v, [](S a, S b) { return a + b; });
  }

  // `rows` rows of the matrix as tile[C][L]; lanes without a row are 0.
  static DAFL_HD void load_tile(const Matrix& matrix, int64_t row, int64_t rows, int64_t N,
                                int64_t C, V* tile) {
    if (rows == L && M::load_tile(matrix, row, N, C, tile)) return;
    S* values = reinterpret_cast<S*>(tile);
    if (rows < L) {
      for (int64_t k = 0; k < C; ++k) tile[k] = V{};
    }
    for (int64_t r = 0; r < rows; ++r) M::gather(matrix, row + r, C, values + r, L);
    M::decode(matrix.dtype, values, C * L);
  }

  static DAFL_HD void store_tile(V* tile, int64_t row, int64_t rows, int64_t C, Dtype dtype,
                                 void* grad) {
    if (rows == L && dtype == Dtype::f32 && sizeof(S) == 4) {
      return M::store_tile(tile, row, C, static_cast<float*>(grad));
    }
    S* values = reinterpret_cast<S*>(tile);
    M::encode(dtype, values, C * L);
    for (int64_t r = 0; r < rows; ++r) {
      M::scatter(dtype, values + r, L, C, grad, (row + r) * C);
    }
  }

  // One row as contiguous values: in place where it is one already, else through scratch.
  static DAFL_HD const S* load_row(const Matrix& matrix, int64_t row, int64_t C, S* scratch) {
    if (M::in_place(matrix.dtype) && matrix.col_stride == 1) {
      return static_cast<const S*>(matrix.data) + row * matrix.row_stride;
    }
    M::gather(matrix, row, C, scratch, 1);
    M::decode(matrix.dtype, scratch, C);
    return scratch;
  }

  static DAFL_HD void store_row(S* values, int64_t row, int64_t C, Dtype dtype, void* grad) {
    M::encode(dtype, values, C);
    M::scatter(dtype, values, 1, C, grad, row * C);
  }

  // Where a row's result may be written directly, else scratch that store_row will convert.
  static DAFL_HD S* output_row(Dtype dtype, void* grad, int64_t row, int64_t C, S* scratch) {
    return M::in_place(dtype) ? static_cast<S*>(grad) + row * C : scratch;
  }

  // Row maximum and the lowest index that reaches it, class by class over a tile.
  static DAFL_HD void tile_argmax(const V* tile, int64_t C, V& best, V& index) {
    best = tile[0];
    index = V{};
    for (int64_t k = 1; k < C; ++k) {
      auto better = tile[k] > best;
      best = better ? tile[k] : best;
      index = better ? splat(static_cast<S>(k)) : index;
    }
  }

  // The same for one contiguous row. A NaN is passed over here and met by the sums that follow.
  static DAFL_HD void row_argmax(const S* row, int64_t C, S& best, S& index) {
    const S low = -static_cast<S>(__builtin_inf());
    constexpr int kChains = 4;
    V lane_best[kChains], lane_block[kChains];
    for (int j = 0; j < kChains; ++j) {
      lane_best[j] = splat(low);
      lane_block[j] = V{};
    }
    int64_t k = 0;
    for (; k + kChains * L <= C; k += kChains * L) {
      for (int j = 0; j < kChains; ++j) {
        V x = load(row + k + j * L);
        auto better = x > lane_best[j];
        lane_best[j] = better ? x : lane_best[j];
        lane_block[j] = better ? splat(static_cast<S>(k)) : lane_block[j];
      }
    }
    for (; k < C; k += L) {
      V x = load(row + k, C - k, low);
      auto better = x > lane_best[0];
      lane_best[0] = better ? x : lane_best[0];
      lane_block[0] = better ? splat(static_cast<S>(k)) : lane_block[0];
    }
    V top = lane_best[0];
    for (int j = 1; j < kChains; ++j) top = lane_best[j] > top ? lane_best[j] : top;
    best = across(top, [](S a, S b) { return a > b ? a : b; });
    V first = splat(static_cast<S>(C));
    for (int j = 0; j < kChains; ++j) {
      V at = lane_block[j] + (iota() + static_cast<S>(j * L));
      first = ((lane_best[j] == best) & (at < first)) ? at : first;
    }
    index = across(first, [](S a, S b) { return a < b ? a : b; });
  }
};

// fp32 sums run over at most this many rows before they move into fp64.
constexpr int64_t kBlockRows = 256;

// ---- Generator loss ----------------------------------------------------------------------------

template <class M>
void generator_forward_tiles(const GeneratorForward& a, int64_t begin, int64_t end, double* sums) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  V tile[kTileClasses], mean[kTileClasses];

  for (int64_t block = begin; block < end; block += kBlockRows) {
    int64_t block_end = min_of(block + kBlockRows, end);
    V loss{};
    for (int64_t k = 0; k < a.C; ++k) mean[k] = V{};
    for (int64_t row = block; row < block_end; row += L) {
      int64_t rows = min_of(L, block_end - row);
      O::load_tile(a.logits, row, rows, a.N, a.C, tile);
      V best, y, others{};
      O::tile_argmax(tile, a.C, best, y);
      for (int64_t k = 0; k < a.C; ++k) {
        V shifted = tile[k] - best;
        tile[k] = M::exp(shifted);
        others += row_math::others_term(y == static_cast<S>(k), shifted, tile[k]);
      }
      V total = others + S(1);
      auto present = O::iota() < static_cast<S>(rows);
      V log_total = row_math::log1p_corrected<S>(others, total, M::log(total));
      loss += present ? log_total : V{};
      V inverse = present ? S(1) / total : V{};
      for (int64_t k = 0; k < a.C; ++k) mean[k] += tile[k] * inverse;
      O::store(stats + row, rows, best);
      O::store(stats + a.N + row, rows, others);
      O::store(stats + 2 * a.N + row, rows, y);
    }
    for (int64_t k = 0; k < a.C; ++k) sums[k] += O::sum(mean[k]);
    sums[a.C] += O::sum(loss);
  }
}

template <class M>
void generator_backward_tiles(const GeneratorBackward& a, int64_t begin, int64_t end) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S* slope = static_cast<const S*>(a.slope);
  const S one_hot = static_cast<S>(a.one_hot);
  V tile[kTileClasses] = {};

  for (int64_t row = begin; row < end; row += L) {
    int64_t rows = min_of(L, end - row);
    O::load_tile(a.logits, row, rows, a.N, a.C, tile);
    V best = O::load(stats + row, rows, S(0));
    V others = O::load(stats + a.N + row, rows, S(0));
    V y = O::load(stats + 2 * a.N + row, rows, S(0));
    V inverse = S(1) / (others + S(1));
    V mean_slope{};
    for (int64_t k = 0; k < a.C; ++k) {
      tile[k] = M::exp(tile[k] - best) * inverse;
      mean_slope += tile[k] * slope[k];
    }
    for (int64_t k = 0; k < a.C; ++k) {
      tile[k] = row_math::generator_gradient(y == static_cast<S>(k), tile[k], O::splat(slope[k]),
                                             mean_slope, others, inverse, one_hot);
    }
    O::store_tile(tile, row, rows, a.C, a.logits.dtype, a.grad);
  }
}

template <class M>
void generator_forward_rows(const GeneratorForward& a, int64_t begin, int64_t end, double* sums,
                            typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  const int64_t padded = (a.C + L - 1) / L * L;
  S* mean = scratch;
  S* exps = scratch + padded;
  S* converted = exps + padded;
  const S low = -static_cast<S>(__builtin_inf());

  for (int64_t block = begin; block < end; block += kBlockRows) {
    int64_t block_end = min_of(block + kBlockRows, end);
    for (int64_t k = 0; k < padded; k += L) O::store(mean + k, V{});
    for (int64_t row = block; row < block_end; ++row) {
      const S* t = O::load_row(a.logits, row, a.C, converted);
      S best, y;
      O::row_argmax(t, a.C, best, y);
      V others_lanes{}, position = O::iota();
      for (int64_t k = 0; k < a.C; k += L) {
        V shifted = O::load(t + k, a.C - k, low) - best;
        V e = M::exp(shifted);
        O::store(exps + k, e);
        others_lanes += row_math::others_term(position == y, shifted, e);
        position += static_cast<S>(L);
      }
      S others = O::sum(others_lanes);
      S inverse = S(1) / (others + S(1));
      for (int64_t k = 0; k < padded; k += L) {
        O::store(mean + k, O::load(mean + k) + O::load(exps + k) * inverse);
      }
      stats[row] = best;
      stats[a.N + row] = others;
      stats[2 * a.N + row] = y;
    }
    for (int64_t k = 0; k < a.C; ++k) sums[k] += static_cast<double>(mean[k]);
    V loss{};
    for (int64_t row = block; row < block_end; row += L) {
      V others = O::load(stats + a.N + row, block_end - row, S(0));
      V total = others + S(1);
      loss += row_math::log1p_corrected<S>(others, total, M::log(total));
    }
    sums[a.C] += O::sum(loss);
  }
}

template <class M>
void generator_backward_rows(const GeneratorBackward& a, int64_t begin, int64_t end,
                             typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S* slope = static_cast<const S*>(a.slope);
  const S one_hot = static_cast<S>(a.one_hot);
  const int64_t padded = (a.C + L - 1) / L * L;
  S* probability = scratch;
  S* converted = scratch + padded;
  const S low = -static_cast<S>(__builtin_inf());

  for (int64_t row = begin; row < end; ++row) {
    const S* t = O::load_row(a.logits, row, a.C, converted);
    S best = stats[row], others = stats[a.N + row], y = stats[2 * a.N + row];
    S inverse = S(1) / (others + S(1));
    V slope_lanes{};
    for (int64_t k = 0; k < a.C; k += L) {
      V p = M::exp(O::load(t + k, a.C - k, low) - best) * inverse;
      O::store(probability + k, p);
      slope_lanes += p * O::load(slope + k, a.C - k, S(0));
    }
    const S mean_slope = O::sum(slope_lanes);
    S* out = O::output_row(a.logits.dtype, a.grad, row, a.C, converted);
    // The loop treats every class as one that is not y; then y's own is put right.
    for (int64_t k = 0; k < a.C; k += L) {
      V p = O::load(probability + k);
      O::store(out + k, a.C - k, p * (O::load(slope + k, a.C - k, S(0)) + (one_hot - mean_slope)));
    }
    const int64_t at = static_cast<int64_t>(y);
    out[at] = row_math::generator_gradient(true, probability[at], slope[at], mean_slope, others,
                                           inverse, one_hot);
    if (out == converted) O::store_row(out, row, a.C, a.logits.dtype, a.grad);
  }
}

// ---- Distillation loss -------------------------------------------------------------------------

template <class M>
void distill_forward_tiles(const DistillForward& a, int64_t begin, int64_t end, double* sums) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature);
  V s[kTileClasses], t[kTileClasses], exp_s[kTileClasses], exp_t[kTileClasses];

  for (int64_t block = begin; block < end; block += kBlockRows) {
    int64_t block_end = min_of(block + kBlockRows, end);
    V loss{}, agreeing{};
    for (int64_t row = block; row < block_end; row += L) {
      int64_t rows = min_of(L, block_end - row);
      O::load_tile(a.student, row, rows, a.N, a.C, s);
      O::load_tile(a.teacher, row, rows, a.N, a.C, t);
      V best_s, best_t, y_s, y_t, sum_s{}, sum_t{};
      O::tile_argmax(s, a.C, best_s, y_s);
      O::tile_argmax(t, a.C, best_t, y_t);
      for (int64_t k = 0; k < a.C; ++k) {
        exp_s[k] = M::exp((s[k] - best_s) * scale);
        exp_t[k] = M::exp((t[k] - best_t) * scale);
        sum_s += exp_s[k];
        sum_t += exp_t[k];
      }
      V log_s = M::log(sum_s), log_t = M::log(sum_t);
      V inverse_s = S(1) / sum_s, inverse_t = S(1) / sum_t;
      V shift = best_t - best_s, log_sum_ratio = log_t - log_s, kl{};
      for (int64_t k = 0; k < a.C; ++k) {
        V log_q_ratio = row_math::log_ratio<S>(t[k], s[k], shift, log_sum_ratio, scale);
        kl += row_math::kl_term<S>(exp_t[k] * inverse_t, exp_s[k] * inverse_s, log_q_ratio);
      }
      auto present = O::iota() < static_cast<S>(rows);
      loss += present ? kl : V{};
      agreeing += (present & (y_s == y_t)) ? O::splat(S(1)) : V{};
      O::store(stats + row, rows, best_s);
      O::store(stats + a.N + row, rows, log_s);
      O::store(stats + 2 * a.N + row, rows, best_t);
      O::store(stats + 3 * a.N + row, rows, log_t);
    }
    sums[0] += O::sum(loss);
    sums[1] += O::sum(agreeing);
  }
}

template <class M>
void distill_backward_tiles(const DistillBackward& a, int64_t begin, int64_t end) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature), factor = static_cast<S>(a.factor);
  V s[kTileClasses] = {}, t[kTileClasses];

  for (int64_t row = begin; row < end; row += L) {
    int64_t rows = min_of(L, end - row);
    O::load_tile(a.student, row, rows, a.N, a.C, s);
    O::load_tile(a.teacher, row, rows, a.N, a.C, t);
    V best_s = O::load(stats + row, rows, S(0)), log_s = O::load(stats + a.N + row, rows, S(0));
    V best_t = O::load(stats + 2 * a.N + row, rows, S(0));
    V log_t = O::load(stats + 3 * a.N + row, rows, S(0));
    V shift = best_t - best_s, log_sum_ratio = log_t - log_s;
    for (int64_t k = 0; k < a.C; ++k) {
      V q_s = M::exp((s[k] - best_s) * scale - log_s);
      V q_t = M::exp((t[k] - best_t) * scale - log_t);
      V log_q_ratio = row_math::log_ratio<S>(t[k], s[k], shift, log_sum_ratio, scale);
      s[k] = row_math::kl_gradient<S>(q_t, q_s, log_q_ratio) * factor;
    }
    O::store_tile(s, row, rows, a.C, a.student.dtype, a.grad);
  }
}

template <class M>
void distill_forward_rows(const DistillForward& a, int64_t begin, int64_t end, double* sums,
                          typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature);
  const int64_t padded = (a.C + L - 1) / L * L;
  S* exp_s = scratch;
  S* exp_t = exp_s + padded;
  const S low = -static_cast<S>(__builtin_inf());

  for (int64_t row = begin; row < end; ++row) {
    const S* s = O::load_row(a.student, row, a.C, exp_t + padded);
    const S* t = O::load_row(a.teacher, row, a.C, exp_t + 2 * padded);
    S best_s, best_t, y_s, y_t;
    O::row_argmax(s, a.C, best_s, y_s);
    O::row_argmax(t, a.C, best_t, y_t);
    V lanes_s{}, lanes_t{};
    for (int64_t k = 0; k < a.C; k += L) {
      V e_s = M::exp((O::load(s + k, a.C - k, low) - best_s) * scale);
      V e_t = M::exp((O::load(t + k, a.C - k, low) - best_t) * scale);
      O::store(exp_s + k, e_s);
      O::store(exp_t + k, e_t);
      lanes_s += e_s;
      lanes_t += e_t;
    }
    S sum_s = O::sum(lanes_s), sum_t = O::sum(lanes_t);
    S log_s = M::log(O::splat(sum_s))[0], log_t = M::log(O::splat(sum_t))[0];
    S inverse_s = S(1) / sum_s, inverse_t = S(1) / sum_t;
    V shift = O::splat(best_t - best_s), log_sum_ratio = O::splat(log_t - log_s), kl{};
    for (int64_t k = 0; k < a.C; k += L) {
      V log_q_ratio =
          row_math::log_ratio<S>(O::load(t + k, a.C - k, S(0)), O::load(s + k, a.C - k, S(0)),
                                 shift, log_sum_ratio, scale);
      kl += row_math::kl_term<S>(O::load(exp_t + k) * inverse_t, O::load(exp_s + k) * inverse_s,
                                 log_q_ratio);
    }
    sums[0] += O::sum(kl);
    sums[1] += y_s == y_t ? 1.0 : 0.0;
    stats[row] = best_s;
    stats[a.N + row] = log_s;
    stats[2 * a.N + row] = best_t;
    stats[3 * a.N + row] = log_t;
  }
}

template <class M>
void distill_backward_rows(const DistillBackward& a, int64_t begin, int64_t end,
                           typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature), factor = static_cast<S>(a.factor);
  const int64_t padded = (a.C + L - 1) / L * L;

  for (int64_t row = begin; row < end; ++row) {
    const S* s = O::load_row(a.student, row, a.C, scratch);
    const S* t = O::load_row(a.teacher, row, a.C, scratch + padded);
    S best_s = stats[row], log_s = stats[a.N + row];
    S best_t = stats[2 * a.N + row], log_t = stats[3 * a.N + row];
    V shift = O::splat(best_t - best_s), log_sum_ratio = O::splat(log_t - log_s);
    S* out = O::output_row(a.student.dtype, a.grad, row, a.C, scratch + 2 * padded);
    for (int64_t k = 0; k < a.C; k += L) {
      V student = O::load(s + k, a.C - k, S(0)), teacher = O::load(t + k, a.C - k, S(0));
      V q_s = M::exp((student - best_s) * scale - log_s);
      V q_t = M::exp((teacher - best_t) * scale - log_t);
      V log_q_ratio = row_math::log_ratio<S>(teacher, student, shift, log_sum_ratio, scale);
      O::store(out + k, a.C - k, row_math::kl_gradient<S>(q_t, q_s, log_q_ratio) * factor);
    }
    if (out == scratch + 2 * padded) O::store_row(out, row, a.C, a.student.dtype, a.grad);
  }
}

// ---- Activation loss ---------------------------------------------------------------------------

// Runs `body(values, count, row, column)` over the rows in pieces of at most 1024 contiguous
// values. Rows that lie back to back are one long row.
constexpr int64_t kPiece = 1024;

template <class M, class Body>
DAFL_HD void for_each_piece(const Matrix& f, int64_t F, int64_t begin, int64_t end, Body body) {
  using S = typename M::Scalar;
  int64_t width = F, rows = end - begin;
  if (f.col_stride == 1 && f.row_stride == F) {
    width = F * rows;
    rows = 1;
  }
  alignas(64) S piece[kPiece];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t at = 0; at < width; at += kPiece) {
      int64_t count = min_of(kPiece, width - at);
      // The piece as a one-row matrix of its own.
      int64_t offset = (begin + r) * f.row_stride + at * f.col_stride;
      int64_t size = f.dtype == Dtype::f64 ? 8 : f.dtype == Dtype::f32 ? 4 : 2;
      Matrix part{static_cast<const char*>(f.data) + offset * size, 0, f.col_stride, f.dtype};
      body(Ops<M>::load_row(part, 0, count, piece), count, (begin + r) * F + at);
    }
  }
}

template <class M>
double abs_sum(const Matrix& f, int64_t F, int64_t begin, int64_t end) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  double total = 0;
  for_each_piece<M>(f, F, begin, end, [&](const S* values, int64_t count, int64_t) {
    V sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * L <= count; k += 4 * L) {
      for (int j = 0; j < 4; ++j) {
        V x = O::load(values + k + j * L);
        sums[j] += M::abs(x);
      }
    }
    for (; k < count; k += L) {
      V x = O::load(values + k, count - k, S(0));
      sums[0] += M::abs(x);
    }
    total += O::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  });
  return total;
}

template <class M>
void sign_gradient(const Matrix& f, int64_t F, int64_t begin, int64_t end, double value,
                   void* grad) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const V up = O::splat(static_cast<S>(value)), down = -up;
  for_each_piece<M>(f, F, begin, end, [&](const S* values, int64_t count, int64_t offset) {
    alignas(64) S converted[kPiece];
    S* out = M::in_place(f.dtype) ? static_cast<S*>(grad) + offset : converted;
    for (int64_t k = 0; k < count; k += L) {
      V x = O::load(values + k, count - k, S(0));
      O::store(out + k, count - k, x > S(0) ? up : (x < S(0) ? down : V{}));
    }
    if (out == converted) {
      M::encode(f.dtype, converted, count);
      M::scatter(f.dtype, converted, 1, count, grad, offset);
    }
  });
}

// ---- One table per compute type ----------------------------------------------------------------

template <class M>
void generator_forward(const GeneratorForward& a, int64_t begin, int64_t end, double* sums,
                       void* scratch) {
  if (a.C <= kTileClasses) return generator_forward_tiles<M>(a, begin, end, sums);
  generator_forward_rows<M>(a, begin, end, sums, static_cast<typename M::Scalar*>(scratch));
}

template <class M>
void generator_backward(const GeneratorBackward& a, int64_t begin, int64_t end, void* scratch) {
  if (a.C <= kTileClasses) return generator_backward_tiles<M>(a, begin, end);
  generator_backward_rows<M>(a, begin, end, static_cast<typename M::Scalar*>(scratch));
}

template <class M>
void distill_forward(const DistillForward& a, int64_t begin, int64_t end, double* sums,
                     void* scratch) {
  if (a.C <= kTileClasses) return distill_forward_tiles<M>(a, begin, end, sums);
  distill_forward_rows<M>(a, begin, end, sums, static_cast<typename M::Scalar*>(scratch));
}

template <class M>
void distill_backward(const DistillBackward& a, int64_t begin, int64_t end, void* scratch) {
  if (a.C <= kTileClasses) return distill_backward_tiles<M>(a, begin, end);
  distill_backward_rows<M>(a, begin, end, static_cast<typename M::Scalar*>(scratch));
}

template <class M>
constexpr Kernels table() {
  return {generator_forward<M>, generator_backward<M>, distill_forward<M>, distill_backward<M>,
          abs_sum<M>,           sign_gradient<M>};
}

}  // namespace

extern const Kernels f32_kernels;
const Kernels f32_kernels = table<FloatMath>();
#ifdef DAFL_WITH_F64
extern const Kernels f64_kernels;
const Kernels f64_kernels = table<DoubleMath>();
#endif

}  // namespace DAFL_ISA
}  // namespace cpu
}  // namespace dafl
