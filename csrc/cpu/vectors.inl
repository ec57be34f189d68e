// Vectors for the CPU kernels: vectors of the compilers' own (GCC and Clang `vector_size`),
// transposition in registers, 16-bit floats, typed memory access, and pixels with a border of
// zeros.

#define DAFL_UNROLL _Pragma("GCC unroll 16")

typedef float F32 __attribute__((vector_size(DAFL_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(DAFL_VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(DAFL_VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(DAFL_VECTOR_BYTES)));
typedef int64_t I64 __attribute__((vector_size(DAFL_VECTOR_BYTES)));

template <class To, class From>
DAFL_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// An L x L block in registers, rows to columns: log2 L rounds, each of which swaps the off-diagonal
// D x D sub-blocks of every pair of rows that are D apart.
#if DAFL_VECTOR_BYTES == 64
#define DAFL_LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif DAFL_VECTOR_BYTES == 32
#define DAFL_LANES 0, 1, 2, 3, 4, 5, 6, 7
#else
#define DAFL_LANES 0, 1, 2, 3
#endif

template <int... I>
struct Lanes {
  static constexpr int L = sizeof...(I);

  template <int... At>
  static DAFL_HD F32 shuffle(F32 a, F32 b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, At...);
#else
    return __builtin_shuffle(a, b, I32{At...});
#endif
  }

  template <int D>
  static DAFL_HD void swap_blocks(F32* row) {
    for (int i = 0; i < L; ++i) {
      if (i & D) continue;
      F32 a = row[i], b = row[i + D];
      row[i] = shuffle<((I & D) ? L + I - D : I)...>(a, b);
      row[i + D] = shuffle<((I & D) ? L + I : I + D)...>(a, b);
    }
  }

  static DAFL_HD void transpose(F32* row) {
    swap_blocks<1>(row);
    swap_blocks<2>(row);
    if constexpr (L > 4) swap_blocks<4>(row);
    if constexpr (L > 8) swap_blocks<8>(row);
  }
};

DAFL_HD void transpose(F32* row) { Lanes<DAFL_LANES>::transpose(row); }

DAFL_HD void transpose(F64* row) {
  constexpr int lanes = sizeof(F64) / sizeof(double);
  for (int i = 0; i < lanes; ++i) {
    for (int k = 0; k < i; ++k) {
      const double value = row[i][k];
      row[i][k] = row[k][i];
      row[k][i] = value;
    }
  }
}

DAFL_HD int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- 16-bit floats, as bits in the low half of 32 (scalar or vector) ----------------------------

template <class F, class U>
DAFL_HD F decode_bf16(U bits) {
  return bit_cast<F>(bits << 16);
}

template <class F, class U>
DAFL_HD U encode_bf16(F value) {  // round to nearest even; NaN stays NaN
  U bits = bit_cast<U>(value);
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

template <class F, class U>
DAFL_HD F decode_f16(U bits) {
  U sign = (bits & 0x8000u) << 16;
  U magnitude = (bits & 0x7fffu) << 13;
  // Exponent rebias by a multiplication, which turns the largest exponent into inf and NaN ...
  F normal = bit_cast<F>(magnitude + (0xe0u << 23)) * 0x1p-112f;
  // ... and for subnormals through the mantissa of 0.5.
  F subnormal = bit_cast<F>((magnitude >> 13) | (126u << 23)) - 0.5f;
  U result = magnitude < (1u << 23) ? bit_cast<U>(subnormal) : bit_cast<U>(normal);
  return bit_cast<F>(result | sign);
}

template <class F, class U>
DAFL_HD U encode_f16(F value) {  // round to nearest even; NaN stays NaN
  U bits = bit_cast<U>(value);
  U sign = (bits >> 16) & 0x8000u;
  U magnitude = bits & 0x7fffffffu;
  // The first product overflows to inf exactly where fp16 does. Adding a power of two that is 2^13
  // above the value's own then makes the addition itself round to 10 bits.
  F scaled = (bit_cast<F>(magnitude) * 0x1p+112f) * 0x1p-110f;
  U bias = (magnitude << 1) & 0xff000000u;
  bias = bias < 0x71000000u ? (bias & 0u) + 0x71000000u : bias;
  U sum = bit_cast<U>(bit_cast<F>((bias >> 1) + 0x07800000u) + scaled);
  U rounded = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  return sign | (magnitude > 0x7f800000u ? (magnitude & 0u) + 0x7e00u : rounded);
}

// ---- Memory of one dtype, seen as vectors of the compute type ----------------------------------
// T is what lies in memory, S the compute type, V a vector of `lanes` S. `get` and `put` take the
// number of elements that are there: all lanes, or fewer at the end of a row.

typedef uint16_t U16 __attribute__((vector_size(DAFL_VECTOR_BYTES / 2)));

template <class T>
DAFL_HD T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
DAFL_HD void store(void* to, T value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Out of line, because rows seldom end within a vector and callers have many accesses.
template <class Memory>
__attribute__((noinline)) typename Memory::V get_part(const typename Memory::T* from,
                                                      int64_t count) {
  typename Memory::T part[Memory::lanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return Memory::decode(part);
}

template <class Memory>
__attribute__((noinline)) void put_part(typename Memory::T* to, typename Memory::V value,
                                        int64_t count) {
  typename Memory::T part[Memory::lanes];
  Memory::encode(part, value);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

template <class Memory>
struct Access : Memory {
  using typename Memory::T;
  using typename Memory::V;

  static DAFL_HD V get(const T* from, int64_t count) {
    return __builtin_expect(count >= Memory::lanes, 1) ? Memory::decode(from)
                                                       : get_part<Memory>(from, count);
  }

  static DAFL_HD void put(T* to, V value, int64_t count) {
    if (__builtin_expect(count >= Memory::lanes, 1)) {
      Memory::encode(to, value);
    } else {
      put_part<Memory>(to, value, count);
    }
  }
};

struct MemoryF32 {
  using T = float;
  using S = float;
  using V = F32;
  using I = I32;
  static constexpr int lanes = DAFL_VECTOR_BYTES / 4;
  static DAFL_HD V decode(const T* from) { return load<V>(from); }
  static DAFL_HD void encode(T* to, V value) { store(to, value); }
};

struct MemoryBf16 : MemoryF32 {
  using T = uint16_t;
  static DAFL_HD V decode_bits(U32 bits) { return decode_bf16<F32>(bits); }
  static DAFL_HD U32 encode_bits(V value) { return encode_bf16<F32, U32>(value); }
  static DAFL_HD V decode(const T* from) {
    return decode_bits(__builtin_convertvector(load<U16>(from), U32));
  }
  static DAFL_HD void encode(T* to, V value) {
#ifdef DAFL_AVX512_BF16
    store(to, _mm512_cvtneps_pbh(value));
#elif defined(DAFL_NEON_BF16)
    store(to, vcvt_bf16_f32(bit_cast<float32x4_t>(value)));
#else
    store(to, __builtin_convertvector(encode_bits(value), U16));
#endif
  }
};

struct MemoryF16 : MemoryF32 {
  using T = uint16_t;
  static DAFL_HD V decode_bits(U32 bits) { return decode_f16<F32>(bits); }
  static DAFL_HD U32 encode_bits(V value) { return encode_f16<F32, U32>(value); }
  static DAFL_HD V decode(const T* from) {
    return decode_bits(__builtin_convertvector(load<U16>(from), U32));
  }
  static DAFL_HD void encode(T* to, V value) {
    store(to, __builtin_convertvector(encode_bits(value), U16));
  }
};

#ifdef DAFL_WITH_F64
struct MemoryF64 {
  using T = double;
  using S = double;
  using V = F64;
  using I = I64;
  static constexpr int lanes = DAFL_VECTOR_BYTES / 8;
  static DAFL_HD V decode(const T* from) { return load<V>(from); }
  static DAFL_HD void encode(T* to, V value) { store(to, value); }
};
#endif

// The channels of a pixel, or zeros where there is none.
template <class M>
struct Pixel {
  const typename M::T* from;
  int64_t mask;

  DAFL_HD void set(bool there, const typename M::T* pixel) {
    alignas(64) static const typename M::T zeros[M::lanes] = {};
    from = there ? pixel : zeros;
    mask = there ? -1 : 0;
  }

  // A patch of size x size pixels around `corner`, pixel (row, column) of an image [H, W, C].
  template <int size>
  static DAFL_HD void patch(const typename M::T* image, int64_t row, int64_t column, int64_t H,
                            int64_t W, int64_t C, Pixel (&to)[size][size]) {
    const typename M::T* corner = image + (row * W + column) * C;
    const bool inside = row >= 0 && row + size <= H && column >= 0 && column + size <= W;
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        if (inside) {  // as most are: nothing to ask
          to[i][j] = {corner + (i * W + j) * C, -1};
        } else {
          const int64_t r = row + i, c = column + j;
          to[i][j].set(r >= 0 && r < H && c >= 0 && c < W, image + (r * W + c) * C);
        }
      }
    }
  }
  DAFL_HD typename M::V get(int64_t c, int64_t count) const {
    return M::get(from + (c & mask), count);
  }
};
