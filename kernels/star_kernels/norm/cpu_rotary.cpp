// Rotary positions: pairs of channels turned by position * base^(-2 i / D). The angles' sines and cosines are made once
// a token and serve all its heads; the gradient is the rotation back.
#include "native/star.h"

namespace star {
namespace {

// A number in two parts of the kernels' precision, for angles of thousands of turns.
template <class W> struct Parts {
  W high, low;
  explicit Parts(double x) : high(static_cast<W>(x)), low(static_cast<W>(x - static_cast<double>(high))) {}
};

// Past this angle the reduction below would lose bits, and the C library's takes over.
constexpr double kLargestAngle = 1 << 20;

// sin and cos of position * frequency, |angle| <= 2^20, within 1.5 ULP of float32.
//
// angle = n pi/2 + r with pi/2 in three parts: n times the first is a multiple of 2^-23, as the angle is, so the first
// subtraction is exact. What the product of position and frequency lost in rounding is added to r.
template <class V>
inline void sine_cosine(V position_high, V position_low, V frequency_high, V frequency_low, V& sine, V& cosine) {
  const V angle = position_high * frequency_high;
  const V lost = fma(position_low, frequency_high,
                     fma(position_high, frequency_low, fma(position_high, frequency_high, -angle)));
  const V n = round_even(angle * V(0.636619772f));
  V r = fnma(n, V(-4.37113883e-8f), fnma(n, V(1.57079637f), angle));
  r = fnma(n, V(-1.71512451e-15f), r) + lost;
  const V square = r * r;
  // Fits (Lawson) to |r| <= pi/4: relative error 2^-28 for the sine, 2^-33 for the cosine, before rounding.
  V s(-0.000195172659f);
  s = fma(s, square, V(0.008332178f));
  s = fma(s, square, V(-0.166666552f));
  s = fma(r * square, s, r);
  V c(2.44384155e-5f);
  c = fma(c, square, V(-0.00138873677f));
  c = fma(c, square, V(0.0416666456f));
  c = fma(square * square, c, fma(square, V(-0.5f), V(1)));
  // n mod 4 as -2 .. 2.
  const V quadrant = fnma(V(4), round_even(n * V(0.25f)), n);
  const auto odd = abs(quadrant) == V(1), back = abs(quadrant) == V(2);
  const V sine_size = select(odd, c, s), cosine_size = select(odd, s, c);
  sine = select((quadrant == V(-1)) | back, -sine_size, sine_size);
  cosine = select((quadrant == V(1)) | back, -cosine_size, cosine_size);
}

// Sines and cosines of one token's angles, D / 2 of each.
template <class T>
void token_angles(double position, const double* frequency, const Wide<T>* high, const Wide<T>* low, int64_t half,
                  Wide<T>* sine, Wide<T>* cosine) {
  using V = Vec<T>;
  // In the plain build, where fma rounds twice, the C library serves float32 too.
  if constexpr (V::N > 1) {
    if (std::fabs(position) <= kLargestAngle) {
      const Parts<float> parts(position);
      const V position_high(parts.high), position_low(parts.low);
      sweep<V>(half, [=](int64_t i, auto lanes) {
        V s, c;
        sine_cosine(position_high, position_low, V::load(high + i, lanes), V::load(low + i, lanes), s, c);
        s.store(sine + i, lanes);
        c.store(cosine + i, lanes);
      });
      return;
    }
  }
  for (int64_t i = 0; i < half; ++i) {
    sine[i] = static_cast<Wide<T>>(std::sin(position * frequency[i]));
    cosine[i] = static_cast<Wide<T>>(std::cos(position * frequency[i]));
  }
}

// Pairs (x_i, x_{i + half}).
template <class T>
void turn_halves(const T* x, const Wide<T>* sine, const Wide<T>* cosine, int64_t half, T* y, bool stream) {
  using V = Vec<T>;
  sweep<V>(half, [=](int64_t i, auto lanes) {
    const V first = V::load(x + i, lanes), second = V::load(x + half + i, lanes);
    const V s = V::load(sine + i, lanes), c = V::load(cosine + i, lanes);
    put(fnma(second, s, first * c), y + i, lanes, stream);
    put(fma(first, s, second * c), y + half + i, lanes, stream);
  });
}

// Pairs (x_{2 i}, x_{2 i + 1}), with tables of D numbers: each cosine twice, each sine as (-s, s).
template <class T>
void turn_pairs(const T* x, const Wide<T>* sine, const Wide<T>* cosine, int64_t width, T* y, bool stream) {
  using V = Vec<T>;
  if constexpr (V::N == 1) {
    for (int64_t i = 0; i < width; i += 2) {
      const V first = V::load(x + i), second = V::load(x + i + 1), s = V::load(sine + i + 1), c = V::load(cosine + i);
      fnma(second, s, first * c).store(y + i);
      fma(first, s, second * c).store(y + i + 1);
    }
  } else {
    sweep<V>(width, [=](int64_t i, auto lanes) {
      const V value = V::load(x + i, lanes);
      put(fma(swap_pairs(value), V::load(sine + i, lanes), value * V::load(cosine + i, lanes)), y + i, lanes, stream);
    });
  }
}

// The tables of `turn_pairs` from those of `token_angles`.
template <class W> void spread_pairs(const W* sine, const W* cosine, int64_t half, W* wide_sine, W* wide_cosine) {
  for (int64_t i = 0; i < half; ++i) {
    wide_sine[2 * i] = -sine[i];
    wide_sine[2 * i + 1] = sine[i];
    wide_cosine[2 * i] = wide_cosine[2 * i + 1] = cosine[i];
  }
}

template <class T>
void rotate(const Tensor& x, const Tensor& positions, double base, bool interleaved, bool inverse, Tensor& y) {
  using W = Wide<T>;
  const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), width = x.size(3), half = width / 2;
  Tensor frequencies = empty({half}, DType::kFloat64), parts = empty({2, half}, dtype_of<W>());
  double* frequency = frequencies.mutable_data<double>();
  W *high = parts.mutable_data<W>(), *low = high + half;
  const double ratio = std::pow(base, -2.0 / static_cast<double>(width));
  for (int64_t i = 0; i < half; ++i) {
    // Every 8th by pow, which takes 40 ns; products between, whose relative error stays below 2^-49.
    frequency[i] = i % 8 == 0 ? std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(width))
                              : frequency[i - 1] * ratio;
    const Parts<W> own(frequency[i]);
    high[i] = own.high;
    low[i] = own.low;
  }
  const double* position = positions.data<double>();
  const bool shared = positions.dim() == 1;  // one table serves the token in every row of the batch
  const int64_t rows = shared ? 1 : batch, rows_each = shared ? batch : 1;
  // Tables are made for a block of tokens, so that each row of the batch gives runs of 8 KB and more: token by token,
  // with a jump to the next row after each, 34 MB took 2.1 ms instead of 1.2 (one Zen 4 core).
  // At least 16 blocks, where there are as many tokens, are for the threads.
  constexpr int64_t kTableNumbers = 2048, kTasks = 16;
  const int64_t fitting = width < kTableNumbers && width > 0 ? kTableNumbers / width : 1;
  const int64_t share = (length + kTasks - 1) / kTasks, block = fitting < share ? fitting : share;
  const int64_t blocks = length > 0 ? (length + block - 1) / block : 0, stride = interleaved ? width : half;
  const T* in = x.data<T>();
  T* out = y.mutable_data<T>();
  const bool stream = stream_rows(y, 2) && half * y.element_size() % 64 == 0;  // whole lines in each half
  parallel_for(rows * blocks, grain_rows(block * (rows_each * heads + 4) * width), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    W *sines = scratch.get<W>(block * stride), *cosines = scratch.get<W>(block * stride);
    W *own_sines = scratch.get<W>(half), *own_cosines = scratch.get<W>(half);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, first = task % blocks * block;
      const int64_t count = length - first < block ? length - first : block;
      for (int64_t i = 0; i < count; ++i) {
        const double place = position[row * length + first + i];
        W *sine = sines + i * stride, *cosine = cosines + i * stride;
        token_angles<T>(inverse ? -place : place, frequency, high, low, half, interleaved ? own_sines : sine,
                        interleaved ? own_cosines : cosine);
        if (interleaved) spread_pairs(own_sines, own_cosines, half, sine, cosine);
      }
      for (int64_t b = row; b < row + rows_each; ++b) {
        for (int64_t i = 0; i < count; ++i) {
          const W *sine = sines + i * stride, *cosine = cosines + i * stride;
          const T* from = in + b * x.stride(0) + (first + i) * x.stride(1);
          T* to = out + (b * length + first + i) * heads * width;
          for (int64_t h = 0; h < heads; ++h, from += x.stride(2), to += width) {
            if (interleaved) {
              turn_pairs<T>(from, sine, cosine, width, to, stream);
            } else {
              turn_halves<T>(from, sine, cosine, half, to, stream);
            }
          }
        }
      }
    }
    finish_streaming(stream);
  });
}

Tensor rotary(const Tensor& x_any, const Tensor& positions_any, double base, bool interleaved, bool inverse) {
  require(x_any.dim() == 4 && x_any.size(3) % 2 == 0, "rotary: x must be (B, T, H, D) with an even D");
  const int64_t axes = positions_any.dim();
  require((axes == 1 && positions_any.size(0) == x_any.size(1)) ||
              (axes == 2 && positions_any.size(0) == x_any.size(0) && positions_any.size(1) == x_any.size(1)),
          "rotary: positions must be (T,) or (B, T)");
  const Tensor x = last_contiguous(x_any), positions = widen_integers(positions_any);
  Tensor y = empty_like(x);
  dispatch_dtype(x.dtype(), [&](auto element) {
    rotate<decltype(element)>(x, positions, base, interleaved, inverse, y);
  });
  return y;
}

STAR_OPERATOR("rotary(Tensor x, Tensor positions, float base, bool interleaved, bool inverse) -> Tensor", rotary);

}  // namespace
}  // namespace star
