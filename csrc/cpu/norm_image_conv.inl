// 3x3 convolution to few channels: see ../layers/norm_image_conv.cpp.

template <class M>
void sum_shifted(const ImageConv& a, const void* planes_, const void* bias_, void* y_,
                 void* scratch) {
  using T = typename M::T;
  using V = typename M::V;
  using S = typename M::S;
  const int64_t H = a.H, W = a.W, plane = a.images * H * W, width = W + 32;
  // One row per column of taps, each with a zero before its first element and after its last, and
  // room for the rest of a vector that begins within it.
  S* rows = static_cast<S*>(scratch);
  for (int64_t n = 0; n < a.images; ++n) {
    for (int64_t o = 0; o < a.C; ++o) {
      const T* planes = static_cast<const T*>(planes_) + o * 9 * plane + n * H * W;
      T* y = static_cast<T*>(y_) + (n * a.C + o) * H * W;
      const S bias = static_cast<const S*>(bias_)[o];
      for (int64_t i = 0; i < H; ++i) {
        const int first = i == 0 ? 1 : 0, last = i == H - 1 ? 1 : 2;
        for (int kx = 0; kx < 3; ++kx) {
          S* row = rows + kx * width + 1;
          for (int64_t j = 0; j < W; j += M::lanes) {
            V sum{};
            for (int ky = first; ky <= last; ++ky) {
              sum += M::get(planes + (ky * 3 + kx) * plane + (i + ky - 1) * W + j, W - j);
            }
            store(row + j, sum);
          }
          row[-1] = 0;
          row[W] = 0;
        }
        for (int64_t j = 0; j < W; j += M::lanes) {
          const V sum =
              load<V>(rows + j) + load<V>(rows + width + 1 + j) + load<V>(rows + 2 * width + 2 + j);
          M::put(y + i * W + j, sum + bias, W - j);
        }
      }
    }
  }
}

template <class M>
void shift_apart(const ImageConv& a, const void* y_, void* planes_) {
  using T = typename M::T;
  const int64_t H = a.H, W = a.W, plane = a.images * H * W;
  for (int64_t o = 0; o < a.C; ++o) {
    for (int ky = 0; ky < 3; ++ky) {
      for (int kx = 0; kx < 3; ++kx) {
        T* to = static_cast<T*>(planes_) + ((o * 3 + ky) * 3 + kx) * plane;
        // Row i, column j of the plane is row i + 1 - ky, column j + 1 - kx of y.
        const int64_t begin = kx == 2 ? 1 : 0, end = kx == 0 ? W - 1 : W;
        for (int64_t n = 0; n < a.images; ++n) {
          const T* y = static_cast<const T*>(y_) + (n * a.C + o) * H * W;
          for (int64_t i = 0; i < H; ++i, to += W) {
            const int64_t row = i + 1 - ky;
            if (row < 0 || row >= H) {
              __builtin_memset(to, 0, W * sizeof(T));
              continue;
            }
            to[0] = to[W - 1] = 0;
            __builtin_memcpy(to + begin, y + row * W + begin + 1 - kx, (end - begin) * sizeof(T));
          }
        }
      }
    }
  }
}

// ---- Without a matrix product ------------------------------------------------------------------
// With so few output channels every product is short in one dimension, and faster where the norm is
// computed anyway: each value of x is read once and everything that it gives stays in registers.

// Pixels whose values stay in the L1 cache while their channels are gone through. Those that follow
// are asked for meanwhile: they come from memory, and not one after the other.
constexpr int64_t kPixels = 64;

template <class M>
struct ImageProducts {
  using T = typename M::T;
  using S = typename M::S;
  using V = typename M::V;
  static constexpr int64_t line = 64 / sizeof(T);  // of a cache

  // Operands of `lanes` channels from c.
  struct Channels {
    V scale, shift;
    S slope;

    DAFL_HD Channels(const NormActivation& n, int64_t c)
        : scale(channel<M>(n.scale, c, n.C - c)),
          shift(channel<M>(n.shift, c, n.C - c)),
          slope(static_cast<S>(n.slope)) {}

    DAFL_HD V activation(V x) const {
      const V z = x * scale + shift;
      return z > 0 ? z : z * slope;
    }
    DAFL_HD V before(V x, V grad) const { return x * scale + shift > 0 ? grad : grad * slope; }
  };

  // The gradients of an image with a border of zeros: pixel (i, j) gave to the output's pixel
  // (i + 1 - ky, j + 1 - kx) by tap (ky, kx), whose gradient is at[(2 - ky) * width + 2 - kx].
  struct Grads {
    const S* at;
    int64_t plane, width;

    DAFL_HD const S* of(int64_t o, int64_t row, int64_t column) const {
      return at + o * plane + row * width + column;
    }
    DAFL_HD V tap(const S* pixel, int t) const {
      return pixel[(2 - t / 3) * width + 2 - t % 3] - V{};
    }
  };

  static Grads pad(const ImageConv& a, const void* grad_, S* to) {
    const Grads grads{to, (a.H + 2) * (a.W + 2), a.W + 2};
    const T* grad = static_cast<const T*>(grad_);
    for (int64_t o = 0; o < a.C; ++o) {
      for (int64_t i = 0; i < a.H + 2; ++i, to += a.W + 2) {
        for (int64_t j = 0; j < a.W + 2; ++j) to[j] = 0;
        if (i == 0 || i > a.H) continue;
        const T* from = grad + (o * a.H + i - 1) * a.W;
        for (int64_t j = 0; j < a.W; j += M::lanes) {
          const V values = M::get(from + j, a.W - j);
          for (int64_t l = 0; l < min_of(M::lanes, a.W - j); ++l) to[1 + j + l] = values[l];
        }
      }
    }
    return grads;
  }

  // body(first row, rows) of an image, for about kPixels pixels at a time
  template <class Body>
  static DAFL_HD void by_rows(const ImageConv& a, Body body) {
    const int64_t most = kPixels / a.W + 1;
    for (int64_t i = 0; i < a.H; i += most) body(i, min_of(most, a.H - i));
  }

  static int64_t scratch(const ImageConv& a, int64_t Ci) {
    const int64_t channels = (Ci + M::lanes - 1) / M::lanes * M::lanes;
    return (2 + 9 * a.C) * channels + (kPixels + a.W) * M::lanes + a.C * (a.H + 2) * (a.W + 2);
  }

  // Planes [9 Co, pixels] of products of the activations [pixels, Ci] and taps [9 Co, Ci].
  static void planes(const void* activations_, const void* taps_, int64_t pixels, int64_t Ci,
                     int64_t count, void* planes_) {
    const T* activations = static_cast<const T*>(activations_);
    for (int64_t p = 0; p < pixels; p += M::lanes) {
      const T* from[M::lanes];
      for (int l = 0; l < M::lanes; ++l) {
        from[l] = activations + min_of(p + l, pixels - 1) * Ci;
      }
      for (int64_t t = 0; t < count; ++t) {
        const S* taps = static_cast<const S*>(taps_) + t * Ci;
        V sum[M::lanes] = {};
        for (int64_t c = 0; c < Ci; c += M::lanes) {
          const V tap = channel<M>(taps, c, Ci - c);
          DAFL_UNROLL
          for (int l = 0; l < M::lanes; ++l) sum[l] += M::get(from[l] + c, Ci - c) * tap;
        }
        transpose(sum);
        DAFL_UNROLL
        for (int width = M::lanes / 2; width > 0; width /= 2) {
          DAFL_UNROLL
          for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
        }
        M::put(static_cast<T*>(planes_) + t * pixels + p, sum[0], pixels - p);
      }
    }
  }

  // Adds to sums [2 + 9 Co, Ci] those of the gradient before the activation, of that times
  // (x - mean), and the gradients of the taps.
  static void sums(const NormActivation& n, const ImageConv& a, const void* x_, const void* grad,
                   const void* taps_, const void* mean_, double* sums, void* scratch) {
    const int64_t W = a.W, Ci = n.C, count = 2 + 9 * a.C;
    const S* taps = static_cast<const S*>(taps_);
    const int64_t vectors = (Ci + M::lanes - 1) / M::lanes;
    V* all = static_cast<V*>(scratch);
    V* block = all + vectors * count;
    for (int64_t image = 0; image < a.images; ++image) {
      const Grads grads = pad(a, static_cast<const T*>(grad) + image * a.C * a.H * W,
                              reinterpret_cast<S*>(block + kPixels + W));
      for (int64_t k = 0; k < vectors * count; ++k) all[k] = V{};
      by_rows(a, [&](int64_t begin, int64_t rows) {
        const T* x = static_cast<const T*>(x_) + (image * a.H + begin) * W * Ci;
        for (int64_t c = 0; c < Ci; c += M::lanes, x += M::lanes) {
          const int64_t here = Ci - c, pixels = rows * W;
          const Channels channels(n, c);
          const V mean = channel<M>(mean_, c, here);
          V* to = all + c / M::lanes * count;
          gradient(grads, a, begin, rows, taps + c, Ci, here, block);
          V sum = to[0], product = to[1];
          for (int64_t p = 0; p < pixels; ++p) {
            const V value = M::get(x + p * Ci, here), g = channels.before(value, block[p]);
            if (c % line == 0) __builtin_prefetch(x + (p + rows * W) * Ci);
            sum += g;
            product += g * (value - mean);
            block[p] = channels.activation(value);
          }
          to[0] = sum;
          to[1] = product;
          for (int64_t o = 0; o < a.C; ++o) {
            V tap[9];
            DAFL_UNROLL
            for (int t = 0; t < 9; ++t) tap[t] = to[2 + 9 * o + t];
            const V* y = block;
            for (int64_t i = begin; i < begin + rows; ++i) {
              const S* pixel = grads.of(o, i, 0);
              for (int64_t j = 0; j < W; ++j, ++pixel, ++y) {
                DAFL_UNROLL
                for (int t = 0; t < 9; ++t) tap[t] += *y * grads.tap(pixel, t);
              }
            }
            DAFL_UNROLL
            for (int t = 0; t < 9; ++t) to[2 + 9 * o + t] = tap[t];
          }
        }
      });
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t c = 0; c < Ci; ++c) {
          sums[k * Ci + c] += all[c / M::lanes * count + k][c % M::lanes];
        }
      }
    }
  }

  // grad_x = scale * gradient before the activation + by_x * x + constant
  static void gradients(const NormActivation& n, const ImageConv& a, const void* x_,
                        const void* grad, const void* taps_, const void* by_x_,
                        const void* constant_, void* grad_x_, void* scratch) {
    const int64_t W = a.W, Ci = n.C;
    const S* taps = static_cast<const S*>(taps_);
    V* block = static_cast<V*>(scratch);
    for (int64_t image = 0; image < a.images; ++image) {
      const Grads grads = pad(a, static_cast<const T*>(grad) + image * a.C * a.H * W,
                              reinterpret_cast<S*>(block + kPixels + W));
      by_rows(a, [&](int64_t begin, int64_t rows) {
        const int64_t first = (image * a.H + begin) * W * Ci;
        for (int64_t c = 0; c < Ci; c += M::lanes) {
          const int64_t here = Ci - c;
          const Channels channels(n, c);
          const V by_x = channel<M>(by_x_, c, here), constant = channel<M>(constant_, c, here);
          const T* x = static_cast<const T*>(x_) + first + c;
          T* grad_x = static_cast<T*>(grad_x_) + first + c;
          gradient(grads, a, begin, rows, taps + c, Ci, here, block);
          for (int64_t p = 0; p < rows * W; ++p) {
            const V value = M::get(x + p * Ci, here), g = channels.before(value, block[p]);
            if (c % line == 0) {
              __builtin_prefetch(x + (p + rows * W) * Ci);
              __builtin_prefetch(grad_x + (p + rows * W) * Ci, 1);
            }
            M::put(grad_x + p * Ci, channels.scale * g + (by_x * value + constant), here);
          }
        }
      });
    }
  }

 private:
  // Of the activations of some rows of pixels, `count` of their channels.
  static DAFL_HD void gradient(const Grads& grads, const ImageConv& a, int64_t begin, int64_t rows,
                               const S* taps, int64_t Ci, int64_t count, V* to) {
    for (int64_t o = 0; o < a.C; ++o, taps += 9 * Ci) {
      V tap[9], *at = to;
      DAFL_UNROLL
      for (int t = 0; t < 9; ++t) tap[t] = channel<M>(taps + t * Ci, 0, count);
      for (int64_t i = begin; i < begin + rows; ++i) {
        const S* pixel = grads.of(o, i, 0);
        for (int64_t j = 0; j < a.W; ++j, ++pixel, ++at) {
          V part[3] = {o == 0 ? V{} : *at};
          DAFL_UNROLL
          for (int t = 0; t < 9; ++t) part[t % 3] += tap[t] * grads.tap(pixel, t);
          *at = (part[0] + part[1]) + part[2];
        }
      }
    }
  }
};
