// Valid 5x5 convolution, 2x2 max pooling, ReLU: see ../layers/conv_pool.cpp.
//
// A lane is an image: the images of a block are transposed to [in, H, W][lanes] in scratch, after
// which no operation crosses lanes and any number of channels is as good as any other.

// Channels whose sums are in registers at a time, of 32 with AVX-512 and on ARM, else of 16: in the
// convolution and in the gradients of weights and inputs.
#ifdef __aarch64__
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = DAFL_VECTOR_BYTES == 64;
#endif
constexpr int64_t kOutputs = kManyRegisters ? 4 : 3;
constexpr int64_t kWeights = kManyRegisters ? 4 : 2;
constexpr int64_t kInputs = kOutputs;

// [lanes images, size] of the activations' dtype to [size][lanes]; absent images become zeros.
template <class M>
void block_in(const typename M::T* from, int64_t images, int64_t size, typename M::V* to) {
  using V = typename M::V;
  for (int64_t f = 0; f < size; f += M::lanes) {
    V block[M::lanes];
    for (int k = 0; k < M::lanes; ++k) {
      block[k] = k < images ? M::get(from + k * size + f, size - f) : V{};
    }
    transpose(block);
    for (int64_t k = 0; k < min_of(M::lanes, size - f); ++k) to[f + k] = block[k];
  }
}

template <class M>
void block_out(const typename M::V* from, int64_t images, int64_t size, typename M::T* to) {
  using V = typename M::V;
  for (int64_t f = 0; f < size; f += M::lanes) {
    V block[M::lanes];
    for (int k = 0; k < M::lanes; ++k) block[k] = f + k < size ? from[f + k] : V{};
    transpose(block);
    for (int64_t k = 0; k < min_of(M::lanes, images); ++k) {
      M::put(to + k * size + f, block[k], size - f);
    }
  }
}

template <class M>
struct ConvPoolBlock {
  using T = typename M::T;
  using S = typename M::S;
  using V = typename M::V;
  using I = typename M::I;
  typedef uint8_t Bytes __attribute__((vector_size(M::lanes)));
  static constexpr int kMargin = 4;

  const ConvPool& a;
  const int64_t height = a.pooled_height(), width = a.pooled_width();
  const int64_t size = a.in * a.H * a.W, pooled = a.out * height * width;
  const int64_t row = 2 * width + 2 * kMargin;  // of a row of gradients with margins
  const S* weight = static_cast<const S*>(a.weight);
  // Scratch, one vector a value.
  V* x;          // [in, H, W]
  V* y;          // [out, height, width]: outputs or their gradients
  V* grad_x;     // [in, H, W]
  V* grad_w;     // [in, 5, out, 5]
  V* grad_b;     // [out]
  V* gradients;  // [2, out, row]: of the convolution's outputs for one row of pooled ones

  static int64_t scratch(const ConvPool& a) {
    const ConvPoolBlock block(a, nullptr);
    const int64_t gradients = 2 * a.out * block.row;
    return (2 * block.size + block.pooled + a.in * a.out * 25 + a.out + gradients) * M::lanes;
  }

  ConvPoolBlock(const ConvPool& a, void* scratch) : a(a) {
    x = static_cast<V*>(scratch);
    y = x + size;
    grad_x = y + pooled;
    grad_w = grad_x + size;
    grad_b = grad_w + a.in * a.out * 25;
    gradients = grad_b + a.out;
  }

  // Output channels [o, o + B) at pooled position (i, j), all images of the block.
  template <int B>
  DAFL_HD void window(int64_t i, int64_t j, int64_t o, uint8_t* index) {
    V sum[B][2][2];
    DAFL_UNROLL
    for (int b = 0; b < B; ++b) {
      const V bias = static_cast<const S*>(a.bias)[o + b] - V{};
      sum[b][0][0] = sum[b][0][1] = sum[b][1][0] = sum[b][1][1] = bias;
    }
    for (int64_t c = 0; c < a.in; ++c) {
      const V* patch = x + (c * a.H + 2 * i) * a.W + 2 * j;
      const S* taps = weight + c * 25 * a.out + o;
      DAFL_UNROLL
      for (int r = 0; r < 6; ++r) {
        V in[6];
        DAFL_UNROLL
        for (int k = 0; k < 6; ++k) in[k] = patch[r * a.W + k];
        DAFL_UNROLL
        for (int kx = 0; kx < 5; ++kx) {
          DAFL_UNROLL
          for (int dy = 0; dy < 2; ++dy) {
            if (r - dy < 0 || r - dy > 4) continue;
            DAFL_UNROLL
            for (int b = 0; b < B; ++b) {
              const V tap = taps[((r - dy) * 5 + kx) * a.out + b] - V{};
              sum[b][dy][0] += in[kx] * tap;
              sum[b][dy][1] += in[kx + 1] * tap;
            }
          }
        }
      }
    }
    DAFL_UNROLL
    for (int b = 0; b < B; ++b) {
      V best = sum[b][0][0];
      I which{};
      DAFL_UNROLL
      for (int k = 1; k < 4; ++k) {  // the first of equals wins, NaN wins over all
        const V value = sum[b][k / 2][k % 2];
        const I better = (value > best) | (value != value);
        best = better ? value : best;
        which = better ? I{} + k : which;
      }
      const I off = best <= 0;
      const int64_t at = ((o + b) * height + i) * width + j;
      y[at] = off ? V{} : best;
      store(index + at * M::lanes, __builtin_convertvector((off ? I{} + 4 : which), Bytes));
    }
  }

  template <int B>
  void forward(int64_t o, uint8_t* index) {
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) window<B>(i, j, o, index);
    }
  }

  // Gradients of the convolution's outputs in rows 2i and 2i + 1: nonzero where a pixel won.
  void spread(int64_t i, const uint8_t* index) {
    for (int64_t o = 0; o < a.out; ++o) {
      V* rows[2] = {gradients + o * row + kMargin, gradients + (a.out + o) * row + kMargin};
      V sum = grad_b[o];
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = (o * height + i) * width + j;
        const I which = __builtin_convertvector(load<Bytes>(index + at * M::lanes), I);
        const V g = y[at];
        for (int k = 0; k < 4; ++k) rows[k / 2][2 * j + k % 2] = which == k ? g : V{};
        sum += which < 4 ? g : V{};
      }
      grad_b[o] = sum;
    }
  }

  // Adds what rows 2i and 2i + 1 give to the weights of output channels [o, o + B).
  template <int B>
  void weights(int64_t i, int64_t o) {
    for (int64_t c = 0; c < a.in; ++c) {
      for (int ky = 0; ky < 5; ++ky) {
        V* to = grad_w + ((c * 5 + ky) * a.out + o) * 5;
        V sum[B][5];
        DAFL_UNROLL
        for (int b = 0; b < B; ++b) {
          DAFL_UNROLL
          for (int kx = 0; kx < 5; ++kx) sum[b][kx] = to[b * 5 + kx];
        }
        for (int dy = 0; dy < 2; ++dy) {
          const V* in = x + (c * a.H + 2 * i + dy + ky) * a.W;
          const V* g = gradients + (dy * a.out + o) * row + kMargin;
          for (int64_t j = 0; j < 2 * width; ++j) {
            DAFL_UNROLL
            for (int b = 0; b < B; ++b) {
              const V value = g[b * row + j];
              DAFL_UNROLL
              for (int kx = 0; kx < 5; ++kx) sum[b][kx] += value * in[j + kx];
            }
          }
        }
        DAFL_UNROLL
        for (int b = 0; b < B; ++b) {
          DAFL_UNROLL
          for (int kx = 0; kx < 5; ++kx) to[b * 5 + kx] = sum[b][kx];
        }
      }
    }
  }

  // Adds what rows 2i and 2i + 1 give to columns [j, j + P) of the input, channels [c, c + B).
  template <int B, int P>
  DAFL_HD void inputs(int64_t i, int64_t c, int64_t j) {
    for (int r = 0; r < 6; ++r) {
      V* to = grad_x + (c * a.H + 2 * i + r) * a.W + j;
      const int64_t channel = a.H * a.W;
      V sum[B][P];
      DAFL_UNROLL
      for (int b = 0; b < B; ++b) {
        DAFL_UNROLL
        for (int p = 0; p < P; ++p) sum[b][p] = to[b * channel + p];
      }
      for (int dy = 0; dy < 2; ++dy) {
        const int ky = r - dy;
        if (ky < 0 || ky > 4) continue;
        for (int64_t o = 0; o < a.out; ++o) {
          const V* g = gradients + (dy * a.out + o) * row + kMargin + j;
          const S* taps = weight + (c * 25 + ky * 5) * a.out + o;
          V near[P + 4];
          DAFL_UNROLL
          for (int k = 0; k < P + 4; ++k) near[k] = g[k - 4];
          DAFL_UNROLL
          for (int b = 0; b < B; ++b) {
            DAFL_UNROLL
            for (int kx = 0; kx < 5; ++kx) {
              const V tap = taps[(b * 25 + kx) * a.out] - V{};
              DAFL_UNROLL
              for (int p = 0; p < P; ++p) sum[b][p] += near[p + 4 - kx] * tap;
            }
          }
        }
      }
      DAFL_UNROLL
      for (int b = 0; b < B; ++b) {
        DAFL_UNROLL
        for (int p = 0; p < P; ++p) to[b * channel + p] = sum[b][p];
      }
    }
  }

  template <int B>
  void input_rows(int64_t i, int64_t c) {
    int64_t j = 0;
    if constexpr (B == 1) {  // more columns, as additions of few sums wait for one another
      for (; j + 8 <= 2 * width + 4; j += 8) inputs<B, 8>(i, c, j);
    }
    for (; j + 4 <= 2 * width + 4; j += 4) inputs<B, 4>(i, c, j);
    if (j < 2 * width + 4) inputs<B, 2>(i, c, j);
  }
};

// Calls step(first channel, number) with numbers of at most `largest`, as equal as they can be.
#define DAFL_BY_CHANNELS(channels, largest, first, call)                            \
  for (int64_t pieces_ = (channels + largest - 1) / largest, piece_ = 0, first = 0; \
       piece_ < pieces_; ++piece_) {                                                \
    const int64_t next_ = (piece_ + 1) * channels / pieces_;                        \
    switch (next_ - first) {                                                        \
      case 1:                                                                       \
        call(1);                                                                    \
        break;                                                                      \
      case 2:                                                                       \
        call(2);                                                                    \
        break;                                                                      \
      case 3:                                                                       \
        call(3);                                                                    \
        break;                                                                      \
      default:                                                                      \
        call(4);                                                                    \
    }                                                                               \
    first = next_;                                                                  \
  }

template <class M>
void conv_pool(const ConvPool& a, int64_t begin, int64_t end, void* y, void* scratch) {
  using T = typename M::T;
  ConvPoolBlock<M> block(a, scratch);
  for (int64_t n = begin; n < end; n += M::lanes) {
    const int64_t images = min_of(M::lanes, end - n);
    uint8_t* index = a.index + n * block.pooled;
    block_in<M>(static_cast<const T*>(a.x) + n * block.size, images, block.size, block.x);
#define DAFL_CALL(B) block.template forward<B>(o, index)
    DAFL_BY_CHANNELS(a.out, kOutputs, o, DAFL_CALL)
#undef DAFL_CALL
    block_out<M>(block.y, images, block.pooled, static_cast<T*>(y) + n * block.pooled);
  }
  if (end < a.N) return;
  // The index has room for the lanes of the widest vectors: the same bytes at every call.
  const int64_t written = (end + M::lanes - 1) / M::lanes * M::lanes;
  const int64_t room = (end + kConvPoolImages - 1) / kConvPoolImages * kConvPoolImages;
  for (int64_t k = written * block.pooled; k < room * block.pooled; ++k) a.index[k] = 0;
}

template <class M>
void conv_pool_gradient(const ConvPool& a, int64_t begin, int64_t end, const void* grad,
                        void* grad_x, double* sums, void* scratch) {
  using T = typename M::T;
  using V = typename M::V;
  ConvPoolBlock<M> block(a, scratch);
  const int64_t weights = a.in * a.out * 25;
  // The margins of `gradients` stay zero from here on.
  const int64_t zeros = weights + a.out + 2 * a.out * block.row;
  for (int64_t k = 0; k < zeros; ++k) block.grad_w[k] = V{};
  for (int64_t n = begin; n < end; n += M::lanes) {
    const int64_t images = min_of(M::lanes, end - n);
    const uint8_t* index = a.index + n * block.pooled;
    block_in<M>(static_cast<const T*>(grad) + n * block.pooled, images, block.pooled, block.y);
    if (sums != nullptr) {
      block_in<M>(static_cast<const T*>(a.x) + n * block.size, images, block.size, block.x);
    }
    if (grad_x != nullptr) {
      for (int64_t k = 0; k < block.size; ++k) block.grad_x[k] = V{};
    }
    for (int64_t i = 0; i < block.height; ++i) {
      block.spread(i, index);
      if (sums != nullptr) {
#define DAFL_CALL(B) block.template weights<B>(i, o)
        DAFL_BY_CHANNELS(a.out, kWeights, o, DAFL_CALL)
#undef DAFL_CALL
      }
      if (grad_x != nullptr) {
#define DAFL_CALL(B) block.template input_rows<B>(i, c)
        DAFL_BY_CHANNELS(a.in, kInputs, c, DAFL_CALL)
#undef DAFL_CALL
      }
    }
    if (grad_x != nullptr) {
      block_out<M>(block.grad_x, images, block.size, static_cast<T*>(grad_x) + n * block.size);
    }
  }
  if (sums == nullptr) return;
  for (int64_t o = 0; o < a.out; ++o) {
    for (int64_t c = 0; c < a.in; ++c) {
      for (int k = 0; k < 25; ++k) {
        const V& lanes = block.grad_w[((c * 5 + k / 5) * a.out + o) * 5 + k % 5];
        double sum = 0;
        for (int l = 0; l < M::lanes; ++l) sum += lanes[l];
        sums[(o * a.in + c) * 25 + k] = sum;
      }
    }
    double sum = 0;
    for (int l = 0; l < M::lanes; ++l) sum += block.grad_b[o][l];
    sums[weights + o] = sum;
  }
}

template <class M>
int64_t conv_pool_scratch(const ConvPool& a) {
  return ConvPoolBlock<M>::scratch(a);
}
