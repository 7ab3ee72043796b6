// The backward of the short convolutions by register tiles: kTile tokens of whole vectors of channels at a time.
#pragma once

#include "short_conv/conv.h"

namespace star {

// One token of a block of channels, and the token W - 1 before it, whose input's gradient it completes.
template <class T> struct Row {
  const T *dy, *x, *gate_in, *gate_out;
  T* dgate_out;
  const T *past_x, *past_gate_in;
  T *dx, *dgate_in;
};

// The tensors along time of one call.
template <class T> struct Planes {
  Plane<const T> dy, x, gate_in, gate_out;
  Plane<T> dx, dgate_in, dgate_out;

  Row<T> row(int64_t b, int64_t t, int64_t past, int64_t channel) const {
    return {dy.at(b, t, channel),        x.at(b, t, channel),
            gate_in.at(b, t, channel),   gate_out.at(b, t, channel),
            dgate_out.at(b, t, channel), x.at(b, t - past, channel),
            gate_in.at(b, t - past, channel), dx.at(b, t - past, channel),
            dgate_in.at(b, t - past, channel)};
  }
};

// The last tokens' rows of u or g, oldest first: W - 1 of the past, then up to kTile new ones. A row lies in memory of
// its own (`slots`), or where the caller's tensor has it already.
template <class W> struct History {
  const W** rows;
  W** slots;
  int64_t past;

  History(Scratch& scratch, int64_t past_rows, int64_t width) : past(past_rows) {
    rows = scratch.get<const W*>(past + kTile);
    slots = scratch.get<W*>(past + kTile);
    W* memory = scratch.get<W>((past + kTile) * width);
    for (int64_t r = 0; r < past + kTile; ++r) slots[r] = memory + r * width;
  }
  // The first `past` rows back into slots of their own.
  void restart() {
    for (int64_t r = 0; r < past; ++r) rows[r] = slots[r];
  }
  // Drop the `count` oldest rows; their memory is used again.
  void drop(int64_t count) {
    W* freed[kTile];
    for (int64_t r = 0; r < count; ++r) freed[r] = slots[r];
    for (int64_t r = 0; r < past; ++r) rows[r] = rows[r + count];
    for (int64_t r = 0; r + count < past + kTile; ++r) slots[r] = slots[r + count];
    for (int64_t r = 0; r < count; ++r) slots[past + kTile - count + r] = freed[r];
  }
};

// Whether u and g need rows of their own: for float and double without a gate x itself is u, and without an activation
// dy itself is g.
template <class T, Kind kind> constexpr bool kOwnInput = kind == Kind::kGated || sizeof(T) != sizeof(Wide<T>);
template <class T, Kind kind> constexpr bool kOwnOutput = kind != Kind::kPlain || sizeof(T) != sizeof(Wide<T>);

// The derivative of silu at z, whose sigmoid is s.
template <class V> inline V silu_slope(V z, V s) { return s * fma(z, V(1) - s, V(1)); }

// What one task works on.
template <class T> struct Block {
  int64_t batch, channel, channels, num_taps;
  const Wide<T>* taps;  // panels of W + 1 rows
  bool stream;
};

// g of kTile tokens of a vector (in `outputs`, dy before), then the gradients of their inputs, then the taps': a phase at
// a time over adjacent memory. Each phase has registers for its taps or sums, and its chains are short enough that the
// processor runs several of them side by side: 2.3 to 2.0 ms for B8 T256 D1024 with silu (Zen 3, two threads).
template <Kind kind, int kTaps, class V, class W = typename V::Scalar>
inline void phases(const W* panel, W* dtaps, const V* inputs, V* outputs, V* du) {
  constexpr int kPast = kTaps - 1;
  V tap[kTaps], sums[kTaps + 1];
  STAR_UNROLL for (int w = 0; w < kTaps; ++w) tap[w] = V::load(panel + w * V::N);
  if constexpr (kind == Kind::kSilu) {
    const V bias = V::load(panel + kTaps * V::N);
    V z[kTile], power[kTile];
    STAR_UNROLL for (int r = 0; r < kTile; ++r) {
      z[r] = bias;
      STAR_UNROLL for (int w = 0; w < kTaps; ++w) z[r] = fma(tap[w], inputs[r + w], z[r]);
    }
    STAR_UNROLL for (int r = 0; r < kTile; ++r) power[r] = sigmoid_power(z[r]);
    STAR_UNROLL for (int r = 0; r < kTile; ++r) {
      outputs[kPast + r] = outputs[kPast + r] * silu_slope(z[r], sigmoid_from(power[r]));
    }
  }
  STAR_UNROLL for (int r = 0; r < kTile; ++r) {
    du[r] = tap[0] * outputs[kPast + r];
    STAR_UNROLL for (int w = 1; w < kTaps; ++w) du[r] = fma(tap[w], outputs[kPast + r - w], du[r]);
  }
  STAR_UNROLL for (int w = 0; w <= kTaps; ++w) sums[w] = V::load(dtaps + w * V::N);
  STAR_UNROLL for (int r = 0; r < kTile; ++r) {
    const V now = outputs[kPast + r];
    STAR_UNROLL for (int w = 0; w < kTaps; ++w) sums[w] = fma(now, inputs[r + w], sums[w]);
    sums[kTaps] = sums[kTaps] + now;
  }
  STAR_UNROLL for (int w = 0; w <= kTaps; ++w) sums[w].store(dtaps + w * V::N);
}

// kTile tokens of the segment, W - 1 or more past its begin, kTile tokens of a vector at a time: the rows of u and g
// slide through registers and the taps' gradients are summed on the way. `channels` is a multiple of V::N. Without
// gates, that is with two streams read and one written.
template <class T, Kind kind, int kTaps>
void interior_tile(const Planes<T>& planes, const Block<T>& block, int64_t t, History<Wide<T>>& u, History<Wide<T>>& g,
                   Wide<T>* dtaps) {
  using V = Vec<T>;
  constexpr int kPast = kTaps - 1;
  const Row<T> first = planes.row(block.batch, t, kPast, block.channel);
  const int64_t x_step = planes.x.token, dy_step = planes.dy.token, dx_step = planes.dx.token;
  const Wide<T>*taps = block.taps, *past_g[kTaps];
  Wide<T>*last_u[kTaps], *last_g[kTaps];
  STAR_UNROLL for (int w = 0; w < kPast; ++w) {
    past_g[w] = g.rows[w];
    last_u[w] = u.slots[kTile + w];
    last_g[w] = g.slots[kTile + w];
    u.rows[kTile + w] = last_u[w];
    g.rows[kTile + w] = last_g[w];
    const int64_t token = t + kTile - kPast + w;
    if constexpr (!kOwnInput<T, kind>) u.rows[kTile + w] = planes.x.at(block.batch, token, block.channel);
    if constexpr (!kOwnOutput<T, kind>) g.rows[kTile + w] = planes.dy.at(block.batch, token, block.channel);
  }
  const bool stream = block.stream;
  int64_t i = 0;
  if constexpr (kPairs<V>) {
    for (; i + 2 * V::N <= block.channels; i += 2 * V::N) {
      const T *x = first.past_x + i, *dy = first.dy + i;
      T* dx = first.dx + i;
      V inputs[2][kPast + kTile], outputs[2][kPast + kTile], du[2][kTile];
      STAR_UNROLL for (int w = 0; w < kPast + kTile; ++w) {
        // The next tile's rows: 4.5 to 3.2 ms where they are 1 KB long, no difference where they are 4 KB.
        if (w >= kPast) __builtin_prefetch(x + kTile * x_step, 0, 2);
        STAR_UNROLL for (int h = 0; h < 2; ++h) inputs[h][w] = V::load(x + h * V::N);
        advance(x, x_step);
      }
      STAR_UNROLL for (int w = 0; w < kPast; ++w) {
        STAR_UNROLL for (int h = 0; h < 2; ++h) outputs[h][w] = V::load(past_g[w] + i + h * V::N);
      }
      STAR_UNROLL for (int r = 0; r < kTile; ++r) {
        __builtin_prefetch(dy + kTile * dy_step, 0, 2);
        STAR_UNROLL for (int h = 0; h < 2; ++h) outputs[h][kPast + r] = V::load(dy + h * V::N);
        advance(dy, dy_step);
      }
      for (int h = 0; h < 2; ++h) {
        const int64_t row = (i + h * V::N) * (kTaps + 1);
        phases<kind, kTaps, V>(taps + row, dtaps + row, inputs[h], outputs[h], du[h]);
      }
      STAR_UNROLL for (int r = 0; r < kTile; ++r) {
        STAR_UNROLL for (int h = 0; h < 2; ++h) put(du[h][r], dx + h * V::N, Full{}, stream);
        advance(dx, dx_step);
      }
      STAR_UNROLL for (int w = 0; w < kPast; ++w) {
        STAR_UNROLL for (int h = 0; h < 2; ++h) {
          if constexpr (kOwnInput<T, kind>) inputs[h][kTile + w].store(last_u[w] + i + h * V::N);
          if constexpr (kOwnOutput<T, kind>) outputs[h][kTile + w].store(last_g[w] + i + h * V::N);
        }
      }
    }
  }
  for (; i < block.channels; i += V::N) {
    const T *x = first.past_x + i, *dy = first.dy + i;
    T* dx = first.dx + i;
    const Wide<T>* panel = taps + i * (kTaps + 1);
    Wide<T>* sum = dtaps + i * (kTaps + 1);
    V tap[kTaps], sums[kTaps + 1], inputs[kPast + kTile], outputs[kPast + kTile];
    STAR_UNROLL for (int w = 0; w < kTaps; ++w) tap[w] = V::load(panel + w * V::N);
    STAR_UNROLL for (int w = 0; w <= kTaps; ++w) sums[w] = V::load(sum + w * V::N);
    const V bias = V::load(panel + kTaps * V::N);
    STAR_UNROLL for (int w = 0; w < kPast; ++w) {
      inputs[w] = V::load(x);
      outputs[w] = V::load(past_g[w] + i);
      advance(x, x_step);
    }
    STAR_UNROLL for (int r = 0; r < kTile; ++r) {
      inputs[kPast + r] = V::load(x);
      V now = V::load(dy);
      if constexpr (kind == Kind::kSilu) {
        V z = bias;
        STAR_UNROLL for (int w = 0; w < kTaps; ++w) z = fma(tap[w], inputs[r + w], z);
        now = now * silu_slope(z, sigmoid(z));
      }
      outputs[kPast + r] = now;
      V du = tap[0] * now;
      STAR_UNROLL for (int w = 1; w < kTaps; ++w) du = fma(tap[w], outputs[kPast + r - w], du);
      put(du, dx, Full{}, stream);
      STAR_UNROLL for (int w = 0; w < kTaps; ++w) sums[w] = fma(now, inputs[r + w], sums[w]);
      sums[kTaps] = sums[kTaps] + now;
      advance(x, x_step);
      advance(dy, dy_step);
      advance(dx, dx_step);
    }
    STAR_UNROLL for (int w = 0; w <= kTaps; ++w) sums[w].store(sum + w * V::N);
    STAR_UNROLL for (int w = 0; w < kPast; ++w) {
      if constexpr (kOwnInput<T, kind>) inputs[kTile + w].store(last_u[w] + i);
      if constexpr (kOwnOutput<T, kind>) outputs[kTile + w].store(last_g[w] + i);
    }
  }
}

}  // namespace star
