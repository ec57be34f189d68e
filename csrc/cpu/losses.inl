// What the losses' kernels are made of: elementary functions, fp32 and fp64 values in memory of any
// dtype, and operations over a vector, a row or a tile.
//
// Two regimes. C <= 32: a lane is a row; tiles of `lanes` rows are transposed into a [C][lanes]
// scratch, and no operation crosses lanes. C > 32: a lane is a column; contiguous fp32 rows are
// read in place, all others are converted into scratch first.

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
    F32 shifted = x * 1.44269504f + 12583039.0f;  // n + 127 in the low bits of the mantissa
    F32 n = shifted - 12583039.0f;
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
    F32 result = series * bit_cast<F32>(bit_cast<U32>(shifted) << 23);
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
      DAFL_UNROLL for (int i = 0; i < lanes; ++i) block[i] = load<F32>(from + i * stride + k);
      transpose(block);
      DAFL_UNROLL for (int i = 0; i < lanes; ++i) tile[k + i] = block[i];
    }
    return true;
  }

  // The way back. A vector that reaches past the end of its row is overwritten by the next row's;
  // at the end of the tile, where there is none, rows are written element by element.
  static DAFL_HD void store_tile(F32* tile, int64_t row, int64_t C, float* grad) {
    const int64_t padded = (C + lanes - 1) / lanes * lanes;
    for (int64_t k = 0; k < padded; k += lanes) transpose(tile + k);
    float* to = grad + row * C;
    for (int64_t i = 0; i < lanes; ++i, to += C) {
      if (i * C + padded <= lanes * C) {
        for (int64_t k = 0; k < C; k += lanes) store(to + k, tile[k + i]);
      } else {
        for (int64_t k = 0; k < C; ++k) to[k] = tile[k / lanes * lanes + i][k % lanes];
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

  static DAFL_HD V max(V a, V b) { return a > b ? a : b; }

  // body(k, count) for the elements [k, k + count) of each vector of a row, all but the last whole.
  template <class Body>
  static DAFL_HD void for_each_vector(int64_t C, Body body) {
    int64_t k = 0;
    for (; k + L <= C; k += L) body(k, L);
    if (k < C) body(k, C - k);
  }

  // The sum of body(k, count) over a row's vectors, in two levels: partial sums of 64 vectors, so
  // that many classes cost no more digits than few. What body returns past `count` must be 0.
  template <class Body>
  static DAFL_HD S row_sum(int64_t C, Body body) {
    V total{};
    for (int64_t begin = 0; begin < C; begin += 64 * L) {
      V part{};
      for_each_vector(C - begin < 64 * L ? C - begin : 64 * L,
                      [&](int64_t k, int64_t count) { part += body(begin + k, count); });
      total += part;
    }
    return sum(total);
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
    const auto at = [&](int64_t k) { return load(row + k, C - k, low); };
    V top = splat(low), group{};  // of each lane, and the first four vectors in which it is
    const auto meet = [&](V a, V b, V c, V d, int64_t k) {
      V x = max(max(a, b), max(c, d));
      auto better = x > top;
      top = better ? x : top;
      group = better ? splat(static_cast<S>(k)) : group;
    };
    int64_t k = 0;
    for (; k + 4 * L <= C; k += 4 * L) {
      meet(load(row + k), load(row + k + L), load(row + k + 2 * L), load(row + k + 3 * L), k);
    }
    if (k < C) meet(at(k), at(k + L), at(k + 2 * L), at(k + 3 * L), k);
    const auto lower = [](S a, S b) { return a < b ? a : b; };
    best = across(top, [](S a, S b) { return a > b ? a : b; });
    group = top == best ? group : splat(static_cast<S>(C));
    k = static_cast<int64_t>(across(group, lower));
    V first = splat(static_cast<S>(C - 1));
    for (int64_t j = 3 * L; j >= 0; j -= L) {
      first = at(k + j) == best ? iota() + static_cast<S>(k + j) : first;
    }
    index = lower(across(first, lower), static_cast<S>(C - 1));  // NaN alone: not past the row
  }

  // exps[k] = exp((row[k] - best) * scale), 0 up to a whole vector, and their sum without y's: d'.
  static DAFL_HD S row_exps(const S* row, int64_t C, S best, S y, S scale, S* exps) {
    const int64_t y_vector = static_cast<int64_t>(y) / L * L;
    return row_sum(C, [&](int64_t k, int64_t count) {
      V shifted = (load(row + k, count, -static_cast<S>(__builtin_inf())) - best) * scale;
      V e = M::exp(shifted);
      store(exps + k, e);
      if (k != y_vector) return e;
      return row_math::others_term(iota() == y - static_cast<S>(k), shifted, e);
    });
  }
};

// fp32 sums run over at most this many rows before they move into fp64.
constexpr int64_t kBlockRows = 256;
