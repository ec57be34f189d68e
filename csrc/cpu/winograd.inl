// The kernels of winograd.h; the mathematics stands in ../layers/winograd.cpp.

// ---- Units and their products ------------------------------------------------------------------

template <class Memory>
struct Single : Access<Memory> {
  using typename Memory::T;
  using typename Memory::V;
  using Unit = T;
  using Compute = Access<Memory>;
  static constexpr int unit = 1;

  static DAFL_HD V multiply_add(Unit a, const Unit* b, V sum) { return sum + a * load<V>(b); }
  // Units of which each holds one lane of `unit` vectors,
  static DAFL_HD V across(const V* values) { return values[0]; }
  // and of values that follow one another in `unit` vectors.
  static DAFL_HD V along(const V* values) { return values[0]; }
};

template <class Memory>
struct Pair : Access<Memory> {
  using typename Memory::T;
  using typename Memory::V;
  using Unit = uint32_t;
  using Compute = Access<MemoryF32>;
  static constexpr int unit = 2;

#ifdef DAFL_AVX512_BF16
  static DAFL_HD V multiply_add(Unit a, const Unit* b, V sum) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(U32{} + a), load<__m512bh>(b));
  }
  static DAFL_HD V across(const V* values) {
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(values[1], values[0]));
    return bit_cast<V>(_mm512_maskz_permutexvar_epi16(~0u, load<__m512i>(order), both));
  }
  static DAFL_HD V along(const V* values) {
    return bit_cast<V>(_mm512_cvtne2ps_pbh(values[1], values[0]));
  }
#elif defined(DAFL_NEON_BF16)  // multiplied in bfmmla.inl
  static DAFL_HD V across(const V* values) {
    return bit_cast<V>(vzip1q_u16(low_half(values[0]), low_half(values[1])));
  }
  static DAFL_HD V along(const V* values) {
    return bit_cast<V>(
        vcombine_u16(vget_low_u16(low_half(values[0])), vget_low_u16(low_half(values[1]))));
  }
  static DAFL_HD uint16x8_t low_half(V values) {
    return bit_cast<uint16x8_t>(vcvtq_low_bf16_f32(bit_cast<float32x4_t>(values)));
  }
#else
  static DAFL_HD V multiply_add(Unit a, const Unit* b, V sum) {
    const U32 first = U32{} + a, second = load<U32>(b);
    sum += Memory::decode_bits(first & 0xffffu) * Memory::decode_bits(second & 0xffffu);
    return sum + Memory::decode_bits(first >> 16) * Memory::decode_bits(second >> 16);
  }
  static DAFL_HD V across(const V* values) {
    return bit_cast<V>(Memory::encode_bits(values[0]) | (Memory::encode_bits(values[1]) << 16));
  }
  static DAFL_HD V along(const V* values) {
    T parts[2 * Memory::lanes];
    Memory::encode(parts, values[0]);
    Memory::encode(parts + Memory::lanes, values[1]);
    return load<V>(parts);
  }
#endif
};

// A block of a product that has its sums in registers: rows and vectors of columns. 24 of the 32
// registers of AVX-512 and NEON, 12 of 16 otherwise; the rest is for the operands.
#if DAFL_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif

template <class M>
struct Panel {
  static constexpr int64_t width = kVectors * M::lanes;

  static DAFL_HD int64_t padded(int64_t C) { return (C + width - 1) / width * width; }
};

// Units of a matrix's rows, or of vectors of its columns: how far one is from the next, and one
// step of the sum from the next.
template <class M>
struct Operand {
  const typename M::Unit* at;
  int64_t apart, step;
};

#ifdef DAFL_NEON_BF16
#include "bfmmla.inl"
#else
template <class M, int R>
DAFL_HD void multiply_rows(Operand<M> a, Operand<M> b, int64_t steps, bool add,
                           typename M::Compute::T* sums) {
  using V = typename M::V;
  constexpr int64_t width = Panel<M>::width;
  V sum[R][kVectors];
  DAFL_UNROLL
  for (int r = 0; r < R; ++r) {
    DAFL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = add ? load<V>(sums + r * width + v * M::lanes) : V{};
    }
  }
  for (int64_t step = 0; step < steps; ++step, a.at += a.step, b.at += b.step) {
    DAFL_UNROLL
    for (int r = 0; r < R; ++r) {
      DAFL_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = M::multiply_add(a.at[r * a.apart], b.at + v * b.apart, sum[r][v]);
      }
    }
  }
  DAFL_UNROLL
  for (int r = 0; r < R; ++r) {
    DAFL_UNROLL
    for (int v = 0; v < kVectors; ++v) store(sums + r * width + v * M::lanes, sum[r][v]);
  }
}
#endif

// sums [rows, width] = a [rows, steps] b [steps, width], added to what they are where `add`
template <class M>
__attribute__((noinline)) void multiply(Operand<M> a, Operand<M> b, int64_t rows, int64_t steps,
                                        bool add, typename M::Compute::T* sums) {
  for (; rows >= kRows; rows -= kRows, a.at += kRows * a.apart, sums += kRows * Panel<M>::width) {
    multiply_rows<M, kRows>(a, b, steps, add, sums);
  }
  switch (rows) {
    case 1:
      return multiply_rows<M, 1>(a, b, steps, add, sums);
    case 2:
      return multiply_rows<M, 2>(a, b, steps, add, sums);
    case 3:
      return multiply_rows<M, 3>(a, b, steps, add, sums);
    case 4:
      return multiply_rows<M, 4>(a, b, steps, add, sums);
    case 5:
      return multiply_rows<M, 5>(a, b, steps, add, sums);
  }
}

// ---- Tiles -------------------------------------------------------------------------------------

struct TilePlace {
  int64_t image, row, column;

  DAFL_HD TilePlace(const Tiles& a, int64_t tile)
      : image(tile / (a.rows() * a.columns())),
        row(tile / a.columns() % a.rows()),
        column(tile % a.columns()) {}

  DAFL_HD void next(const Tiles& a) {
    if (++column < a.columns()) return;
    column = 0;
    if (++row < a.rows()) return;
    row = 0;
    ++image;
  }
};

// The size x size pixels of a tile, which begin `before` pixels before its outputs.
template <class M, int size, int before>
struct Window {
  Pixel<M> pixels[size * size];

  DAFL_HD void set(const Tiles& a, int64_t C, const void* x, const TilePlace& tile, bool there) {
    const auto* image = static_cast<const typename M::T*>(x) + tile.image * a.H * a.W * C;
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        const int64_t row = 2 * tile.row + i - before, column = 2 * tile.column + j - before;
        const bool inside = there && row >= 0 && row < a.H && column >= 0 && column < a.W;
        pixels[size * i + j].set(inside, image + (row * a.W + column) * C);
      }
    }
  }

  DAFL_HD void get(int64_t c, int64_t count, typename M::V* out) const {
    DAFL_UNROLL
    for (int i = 0; i < size * size; ++i) out[i] = pixels[i].get(c, count);
  }
};

template <class M>
struct Inputs : Window<M, 4, 1> {
  using V = typename M::V;

  static DAFL_HD void transform(const V* x, int step, V* out) {
    const V a = x[0], b = x[step], c = x[2 * step], d = x[3 * step];
    out[0] = a - c;
    out[step] = b + c;
    out[2 * step] = c - b;
    out[3 * step] = b - d;
  }

  DAFL_HD void get(int64_t c, int64_t count, V* out) const {
    V x[16];
    Window<M, 4, 1>::get(c, count, x);
    DAFL_UNROLL
    for (int j = 0; j < 4; ++j) transform(x + j, 4, x + j);
    DAFL_UNROLL
    for (int i = 0; i < 4; ++i) transform(x + 4 * i, 1, out + 4 * i);
  }
};

template <class M>
struct OutputGrads : Window<M, 2, 0> {
  using V = typename M::V;

  static DAFL_HD void transform(V a, V b, int step, V* out) {
    out[0] = a;
    out[step] = a + b;
    out[2 * step] = a - b;
    out[3 * step] = -b;
  }

  DAFL_HD void get(int64_t c, int64_t count, V* out) const {
    V x[4], columns[8];
    Window<M, 2, 0>::get(c, count, x);
    DAFL_UNROLL
    for (int j = 0; j < 2; ++j) transform(x[j], x[2 + j], 2, columns + j);
    DAFL_UNROLL
    for (int i = 0; i < 4; ++i) transform(columns[2 * i], columns[2 * i + 1], 1, out + 4 * i);
  }
};

template <class M>
void inputs(const Tiles& a, int64_t C, const void* x, int64_t begin, int64_t end, void* data_) {
  using V = typename M::V;
  const int64_t channels = Panel<M>::padded(C), plane = plane_of(end - begin, channels);
  auto* data = static_cast<typename M::T*>(data_);
  TilePlace place(a, begin);
  for (int64_t tile = begin; tile < end; ++tile, place.next(a), data += channels) {
    Inputs<M> pixels;
    pixels.set(a, C, x, place, true);
    for (int64_t c = 0; c < channels; c += M::lanes) {
      V out[16];
      pixels.get(c, C - c, out);
      DAFL_UNROLL
      for (int k = 0; k < 16; ++k) M::encode(data + k * plane + c, out[k]);
    }
  }
}

template <class M, template <class> class Source>
void by_tile(const Tiles& a, int64_t C, const void* x, const TileRange& range, void* data_) {
  using V = typename M::V;
  const int64_t channels = Panel<M>::padded(C);
  const int64_t steps = row_of_steps(range.last - range.first, M::unit);
  const int64_t plane = channels * steps;
  auto* data = static_cast<typename M::Unit*>(data_);
  data += (range.begin - range.first) / M::unit * M::lanes;
  TilePlace place(a, range.begin);
  for (int64_t tile = range.begin; tile < range.end; tile += M::unit, data += M::lanes) {
    Source<M> sources[M::unit];
    for (int i = 0; i < M::unit; ++i, place.next(a)) {
      sources[i].set(a, C, x, place, tile + i < range.end);
    }
    for (int64_t c = 0; c < channels; c += M::lanes) {
      V out[M::unit][16];
      for (int i = 0; i < M::unit; ++i) sources[i].get(c, C - c, out[i]);
      DAFL_UNROLL
      for (int k = 0; k < 16; ++k) {
        const V values[2] = {out[0][k], out[M::unit - 1][k]};
        store(data + k * plane + c * steps, M::across(values));
      }
    }
  }
}

template <class M>
void outputs(const Tiles& a, int64_t Ci, int64_t C, const void* data_, const void* factors_,
             const void* bias_, int64_t begin, int64_t end, void* scratch, void* y_) {
  using T = typename M::T;
  using V = typename M::V;
  using Compute = typename M::Compute;
  using S = typename Compute::T;
  using Unit = typename M::Unit;
  constexpr int64_t width = Panel<M>::width;
  const int64_t steps = Panel<M>::padded(Ci) / M::unit, panels = Panel<M>::padded(C) / width;
  const int64_t tiles = end - begin, plane = plane_of(tiles, width);
  const int64_t data_plane = plane_of(tiles, steps * M::unit) / M::unit;
  const Unit* data = static_cast<const Unit*>(data_);
  const S* bias = static_cast<const S*>(bias_);
  S* products = static_cast<S*>(scratch);
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int k = 0; k < 16; ++k) {
      const Unit* factors =
          static_cast<const Unit*>(factors_) + (k * panels + panel) * steps * width;
      multiply<M>({data + k * data_plane, steps, 1}, {factors, M::lanes, width}, tiles, steps,
                  false, products + k * plane);
    }
    const S* from = products;
    TilePlace place(a, begin);
    for (int64_t tile = begin; tile < end; ++tile, place.next(a), from += width) {
      const int64_t row = 2 * place.row, column = 2 * place.column;
      T* y = static_cast<T*>(y_) + ((place.image * a.H + row) * a.W + column) * C;
      const bool right = column + 1 < a.W, below = row + 1 < a.H;
      for (int64_t at = 0; at < width && panel * width + at < C; at += M::lanes) {
        const int64_t c = panel * width + at, count = C - c;
        V m[16], half[8];
        DAFL_UNROLL
        for (int k = 0; k < 16; ++k) m[k] = load<V>(from + k * plane + at);
        DAFL_UNROLL
        for (int j = 0; j < 4; ++j) {
          half[j] = m[j] + (m[4 + j] + m[8 + j]);
          half[4 + j] = (m[4 + j] - m[8 + j]) - m[12 + j];
        }
        const V shift = bias == nullptr ? V{} : Compute::get(bias + c, count);
        const V* h = half;
        M::put(y + c, (h[0] + (h[1] + h[2])) + shift, count);
        if (right) M::put(y + C + c, ((h[1] - h[2]) - h[3]) + shift, count);
        if (!below) continue;
        h = half + 4;
        M::put(y + a.W * C + c, (h[0] + (h[1] + h[2])) + shift, count);
        if (right) M::put(y + (a.W + 1) * C + c, ((h[1] - h[2]) - h[3]) + shift, count);
      }
    }
  }
}

// ---- Weights -----------------------------------------------------------------------------------

template <class M>
void weight_gradient(const WeightGradient& a, int64_t begin, int64_t end) {
  using V = typename M::V;
  using Compute = typename M::Compute;
  using S = typename Compute::T;
  using Unit = typename M::Unit;
  constexpr int64_t width = Panel<M>::width, lanes = M::lanes, plane = lanes * width;
  const int64_t steps = (a.tiles + M::unit - 1) / M::unit, row = row_of_steps(a.tiles, M::unit);
  const int64_t blocks = (a.Co + lanes - 1) / lanes;
  const int64_t in = Panel<M>::padded(a.Ci), out = Panel<M>::padded(a.Co);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item / blocks * width, o = item % blocks * lanes;
    const int64_t rows = min_of(lanes, a.Co - o);
    S* sums = static_cast<S*>(a.sums) + (a.first && a.last ? 0 : item * 16 * plane);
    for (int k = 0; k < 16; ++k) {
      multiply<M>({static_cast<const Unit*>(a.grads) + (k * out + o) * row, 1, lanes},
                  {static_cast<const Unit*>(a.data) + (k * in + panel) * row, row * lanes, lanes},
                  rows, steps, !a.first, sums + k * plane);
    }
    if (!a.last) continue;
    for (int64_t r = 0; r < rows; ++r, sums += width) {
      for (int64_t at = 0; at < width && panel + at < a.Ci; at += lanes) {
        const int64_t count = a.Ci - panel - at;
        S* to = static_cast<S*>(a.weight) + (o + r) * 9 * a.Ci + panel + at;
        V half[12];
        DAFL_UNROLL
        for (int j = 0; j < 4; ++j) {
          V u[4];
          DAFL_UNROLL
          for (int i = 0; i < 4; ++i) u[i] = load<V>(sums + (4 * i + j) * plane + at);
          half[j] = u[0] + (u[1] + u[2]) * S(0.5);
          half[4 + j] = (u[1] - u[2]) * S(0.5);
          half[8 + j] = (u[1] + u[2]) * S(0.5) + u[3];
        }
        DAFL_UNROLL
        for (int i = 0; i < 3; ++i, to += 3 * a.Ci) {
          const V* u = half + 4 * i;
          Compute::put(to, u[0] + (u[1] + u[2]) * S(0.5), count);
          Compute::put(to + a.Ci, (u[1] - u[2]) * S(0.5), count);
          Compute::put(to + 2 * a.Ci, (u[1] + u[2]) * S(0.5) + u[3], count);
        }
      }
    }
  }
}

template <class V, class S>
DAFL_HD void factors_of_taps(V a, V b, V c, S half, int step, V* out) {
  const V outer = (a + c) * half, inner = b * half;
  out[0] = a;
  out[step] = outer + inner;
  out[2 * step] = outer - inner;
  out[3 * step] = c;
}

template <class M>
void factors(int64_t Co, int64_t Ci, const void* weight, int64_t begin, int64_t end, void* forward_,
             void* backward_) {
  using V = typename M::V;
  using Compute = typename M::Compute;
  using S = typename Compute::T;
  using Unit = typename M::Unit;
  constexpr int64_t width = Panel<M>::width, lanes = M::lanes;
  const int64_t in = Panel<M>::padded(Ci), out = Panel<M>::padded(Co);
  // Reversing the taps exchanges the outer factors.
  constexpr int reversed[4] = {3, 1, 2, 0};
  // [factor][i][l]: of output channel o + l and input channels c + i * lanes and on
  V u[16][M::unit][lanes];
  for (int64_t o = begin; o < end; o += lanes) {
    for (int64_t c = 0; c < in; c += M::unit * lanes) {
      for (int64_t l = 0; l < lanes; ++l) {
        for (int i = 0; i < M::unit; ++i) {
          const int64_t from = c + i * lanes, count = o + l < Co ? Ci - from : 0;
          const S* taps = static_cast<const S*>(weight) + (o + l) * 9 * Ci + from;
          V w[9], columns[12], all[16];
          DAFL_UNROLL
          for (int t = 0; t < 9; ++t) w[t] = count > 0 ? Compute::get(taps + t * Ci, count) : V{};
          DAFL_UNROLL
          for (int j = 0; j < 3; ++j) {
            factors_of_taps(w[j], w[3 + j], w[6 + j], S(0.5), 3, columns + j);
          }
          DAFL_UNROLL
          for (int t = 0; t < 4; ++t) {
            const V* row = columns + 3 * t;
            factors_of_taps(row[0], row[1], row[2], S(0.5), 1, all + 4 * t);
          }
          DAFL_UNROLL
          for (int k = 0; k < 16; ++k) u[k][i][l] = all[k];
        }
      }
      for (int k = 0; k < 16; ++k) {
        V block[lanes];
        for (int64_t l = 0; l < lanes; ++l) {
          const V values[2] = {u[k][0][l], u[k][M::unit - 1][l]};
          block[l] = M::along(values);
        }
        transpose(block);
        Unit* forward = static_cast<Unit*>(forward_) +
                        (k * out * in + o / width * in * width + c * width) / M::unit + o % width;
        for (int64_t l = 0; l < lanes; ++l) store(forward + l * width, block[l]);
        if (backward_ == nullptr) continue;
        const int reverse = 4 * reversed[k / 4] + reversed[k % 4];
        for (int i = 0; i < M::unit; ++i) {
          const int64_t from = c + i * lanes;
          Unit* backward = static_cast<Unit*>(backward_) +
                           (reverse * in * out + from / width * out * width + o * width) / M::unit +
                           from % width;
          for (int64_t l = 0; l < lanes; l += M::unit) {
            store(backward + l / M::unit * width, M::across(u[k][i] + l));
          }
        }
      }
    }
  }
}
