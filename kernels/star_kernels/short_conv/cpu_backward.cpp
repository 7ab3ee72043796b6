// Gradients of the short convolutions, in one sweep forward in time that recomputes what the forward did.
//
// With z the convolution's output and g = dL/dz, token t adds g_t u_{t - (W - 1) + w} to the gradient of tap w, and
// completes the gradient of the input W - 1 tokens before it: du_{t - (W - 1)} = sum_w tap_w g_{t - w}. So beside the
// past inputs the sweep carries the W - 1 past g (`pending`), and goes on W - 1 tokens past a segment's end: over the
// next segment's g, or over zeros and the final state's gradient. What comes out before the sequence's first token is
// the initial state's gradient.
#include <type_traits>

#include "short_conv/conv.h"

namespace star {
namespace {

template <class T> struct Backward {
  const T *dy, *x, *gate_in, *gate_out;
  T *dx, *dgate_in, *dgate_out;  // at the same token as the rest
  int64_t dy_step, x_step, in_step, out_step, d_step;
  const Wide<T>* taps;  // rows of `filter_rows`
  int64_t tap_step;
  Wide<T>*past, *pending;
  Wide<T>* dtaps;  // W + 1 rows, like `taps`
  int64_t channels;

  void advance(int64_t tokens) {
    dy += tokens * dy_step;
    x += tokens * x_step;
    gate_in += tokens * in_step;
    gate_out += tokens * out_step;
    dx += tokens * d_step;
    dgate_in += tokens * d_step;
    dgate_out += tokens * d_step;
  }
};

template <class T, Kind kind, class L> inline Vec<T> input(const Backward<T>& p, int64_t r, int64_t i, L lanes) {
  const Vec<T> x = Vec<T>::load(p.x + r * p.x_step + i, lanes);
  if constexpr (kind != Kind::kGated) return x;
  return x * Vec<T>::load(p.gate_in + r * p.in_step + i, lanes);
}

// g of token r from the convolution's output z there; `own` tokens belong to this segment and leave their gate's
// gradient.
template <class T, Kind kind, class L>
inline Vec<T> output_gradient(const Backward<T>& p, int64_t r, int64_t i, L lanes, Vec<T> z, bool own) {
  using V = Vec<T>;
  const V dy = V::load(p.dy + r * p.dy_step + i, lanes);
  if constexpr (kind == Kind::kSilu) {
    const V s = sigmoid(z);
    return dy * (s * fma(z, V(1) - s, V(1)));
  } else if constexpr (kind == Kind::kGated) {
    if (own) (dy * z).store(p.dgate_out + r * p.d_step + i, lanes);
    return dy * V::load(p.gate_out + r * p.out_step + i, lanes);
  }
  return dy;
}

// From du of token r to the gradients of x and its gate.
template <class T, Kind kind, class L>
inline void input_gradient(const Backward<T>& p, int64_t r, int64_t i, L lanes, Vec<T> du) {
  using V = Vec<T>;
  if constexpr (kind == Kind::kGated) {
    (du * V::load(p.x + r * p.x_step + i, lanes)).store(p.dgate_in + r * p.d_step + i, lanes);
    du = du * V::load(p.gate_in + r * p.in_step + i, lanes);
  }
  du.store(p.dx + r * p.d_step + i, lanes);
}

// kTile tokens of the whole vectors of channels, all of this segment and W - 1 or more past its begin.
template <class T, Kind kind, int kTaps> void backward_tile(const Backward<T>& p) {
  using V = Vec<T>;
  constexpr int kPast = kTaps - 1;
  for (int64_t i = 0; i + V::N <= p.channels; i += V::N) {
    V taps[kTaps], dtaps[kTaps], window[kPast + kTile], g[kPast + kTile];
    STAR_UNROLL for (int w = 0; w < kTaps; ++w) {
      taps[w] = V::load(p.taps + w * p.tap_step + i);
      dtaps[w] = V::load(p.dtaps + w * p.channels + i);
    }
    STAR_UNROLL for (int w = 0; w < kPast; ++w) {
      window[w] = V::load(p.past + w * p.channels + i);
      g[w] = V::load(p.pending + w * p.channels + i);
    }
    const V bias = V::load(p.taps + kTaps * p.tap_step + i);
    V dbias = V::load(p.dtaps + kTaps * p.channels + i);
    STAR_UNROLL for (int r = 0; r < kTile; ++r) {
      window[kPast + r] = input<T, kind>(p, r, i, Full{});
      V z = bias;
      if constexpr (kind != Kind::kPlain) {
        STAR_UNROLL for (int w = 0; w < kTaps; ++w) z = fma(taps[w], window[r + w], z);
      }
      const V now = output_gradient<T, kind>(p, r, i, Full{}, z, true);
      g[kPast + r] = now;
      STAR_UNROLL for (int w = 0; w < kTaps; ++w) dtaps[w] = fma(now, window[r + w], dtaps[w]);
      dbias = dbias + now;
      V du = taps[0] * now;
      STAR_UNROLL for (int w = 1; w < kTaps; ++w) du = fma(taps[w], g[kPast + r - w], du);
      input_gradient<T, kind>(p, r - kPast, i, Full{}, du);
    }
    STAR_UNROLL for (int w = 0; w < kPast; ++w) {
      window[kTile + w].store(p.past + w * p.channels + i);
      g[kTile + w].store(p.pending + w * p.channels + i);
    }
    STAR_UNROLL for (int w = 0; w < kTaps; ++w) dtaps[w].store(p.dtaps + w * p.channels + i);
    dbias.store(p.dtaps + kTaps * p.channels + i);
  }
}

// What one token does when it is taken alone.
struct Token {
  bool inside;  // of the sequence: it has an input and an output
  bool own;     // of the segment: it counts in the gradients of taps, bias and outer gate
  bool writes;  // du of W - 1 tokens before belongs to the segment
};

// One token of the channels from `from` on, any number of taps; the same operations in the same order. `dstate` is
// where du goes if it belongs to the initial state, and `dfinal` what the final state's gradient adds to it; either may
// be nullptr, and both are states, W - 1 apart from channel to channel.
template <class T, Kind kind>
void backward_token(const Backward<T>& p, int64_t num_taps, int64_t from, Token token, Wide<T>* dstate,
                    const Wide<T>* dfinal) {
  using V = Vec<T>;
  const int64_t past = num_taps - 1;
  sweep<V>(p.channels - from, [&](int64_t offset, auto lanes) {
    const int64_t i = from + offset;
    V now(0);
    if (token.inside) {
      const V value = input<T, kind>(p, 0, i, lanes);
      V z = V::load(p.taps + num_taps * p.tap_step + i, lanes);
      if constexpr (kind != Kind::kPlain) {
        for (int64_t w = 0; w < num_taps; ++w) {
          const V earlier = w < past ? V::load(p.past + w * p.channels + i, lanes) : value;
          z = fma(V::load(p.taps + w * p.tap_step + i, lanes), earlier, z);
        }
      }
      now = output_gradient<T, kind>(p, 0, i, lanes, z, token.own);
      for (int64_t w = 0; w < num_taps; ++w) {
        const V earlier = w < past ? V::load(p.past + w * p.channels + i, lanes) : value;
        if (token.own) {
          Wide<T>* dtap = p.dtaps + w * p.channels + i;
          fma(now, earlier, V::load(dtap, lanes)).store(dtap, lanes);
        }
        if (w > 0) earlier.store(p.past + (w - 1) * p.channels + i, lanes);
      }
      if (token.own) {
        Wide<T>* dbias = p.dtaps + num_taps * p.channels + i;
        (V::load(dbias, lanes) + now).store(dbias, lanes);
      }
    }
    V du = V::load(p.taps + i, lanes) * now;
    for (int64_t w = 1; w < num_taps; ++w) {
      du = fma(V::load(p.taps + w * p.tap_step + i, lanes), V::load(p.pending + (past - w) * p.channels + i, lanes), du);
    }
    for (int64_t w = 0; w < past; ++w) {
      const V later = w + 1 < past ? V::load(p.pending + (w + 1) * p.channels + i, lanes) : now;
      later.store(p.pending + w * p.channels + i, lanes);
    }
    int64_t count = V::N;
    if constexpr (!decltype(lanes)::kFull) count = lanes.count;
    Wide<T> part[V::N];
    if (dfinal != nullptr) {
      for (int64_t c = 0; c < count; ++c) part[c] = dfinal[(i + c) * past];
      du = du + V::load(part, lanes);
    }
    if (token.writes) input_gradient<T, kind>(p, -past, i, lanes, du);
    if (dstate != nullptr) {
      du.store(part, lanes);
      for (int64_t c = 0; c < count; ++c) dstate[(i + c) * past] = part[c];
    }
  });
}

// The unrolled tile for W taps; none for W > 7, nor for float64, which is not tuned.
template <class T, Kind kind> void (*backward_tile_for(int64_t taps))(const Backward<T>&) {
  if constexpr (!std::is_same_v<T, double>) {
    switch (taps) {
      case 1: return backward_tile<T, kind, 1>;
      case 2: return backward_tile<T, kind, 2>;
      case 3: return backward_tile<T, kind, 3>;
      case 4: return backward_tile<T, kind, 4>;
      case 5: return backward_tile<T, kind, 5>;
      case 6: return backward_tile<T, kind, 6>;
      case 7: return backward_tile<T, kind, 7>;
      default: break;
    }
  }
  return nullptr;
}

// One segment of one block of channels. `p` stands at the segment's first token; `dstate` and `dfinal` are the states
// (channels, W - 1) of its sequence.
template <class T, Kind kind>
void backward_segment(Backward<T> p, int64_t num_taps, const Segment& segment, Wide<T>* dstate,
                      const Wide<T>* dfinal) {
  const int64_t past = num_taps - 1;
  const auto tile = backward_tile_for<T, kind>(num_taps);
  const int64_t whole = p.channels / Vec<T>::N * Vec<T>::N;
  const auto one = [&](const Backward<T>& at, int64_t t, int64_t from) {
    const int64_t before = t - past, index = t - segment.start;
    Wide<T>* to_state = segment.begin == segment.start && before < segment.start ? dstate + index : nullptr;
    const Wide<T>* from_state = t >= segment.stop && dfinal != nullptr ? dfinal + (t - segment.stop) : nullptr;
    backward_token<T, kind>(at, num_taps, from, {t < segment.stop, t < segment.end, before >= segment.begin}, to_state,
                            from_state);
  };
  int64_t t = segment.begin;
  if (tile != nullptr && whole > 0) {
    for (; t < segment.end && t < segment.begin + past; ++t, p.advance(1)) one(p, t, 0);
    for (; t + kTile <= segment.end; t += kTile, p.advance(kTile)) {
      tile(p);
      if (whole < p.channels) {
        Backward<T> rest = p;
        for (int r = 0; r < kTile; ++r, rest.advance(1)) one(rest, t + r, whole);
      }
    }
  }
  for (; t < segment.end + past; ++t, p.advance(1)) one(p, t, 0);
}

struct Gradients {
  Tensor dx, dgate_in, dgate_out, dweight, dbias, dstate;
};

template <class T, Kind kind>
void convolve_backward(const Tensor& dy_tensor, const Tensor& dfinal_tensor, const Streams& in, const Tensor& rows,
                       const Tensor& state, const std::vector<Segment>& segments, Gradients& out, Tensor& dtaps) {
  using W = Wide<T>;
  using V = Vec<T>;
  const int64_t channels = in.x.size(2), num_taps = rows.size(0) - 1, past_rows = num_taps - 1;
  const int64_t blocks = blocks_of(channels), num_segments = static_cast<int64_t>(segments.size());
  const Plane<const T> dy(dy_tensor), x(in.x), gate_in(in.gate_in), gate_out(in.gate_out);
  const Plane<T> dx(out.dx), dgate_in(out.dgate_in), dgate_out(out.dgate_out);
  const W *filter = rows.data<W>(), *initial = state ? state.data<W>() : nullptr;
  const W* dfinal = dfinal_tensor ? dfinal_tensor.data<W>() : nullptr;
  W* dstate = out.dstate.mutable_data<W>();
  // Segments are summed within a chunk first, and the chunks after that, in an order that the sizes fix.
  const RowChunks chunks(num_segments, 1);
  Tensor partial = zeros({chunks.count, num_taps + 1, channels}, dtype_of<W>());
  W* partial_data = partial.mutable_data<W>();
  const int64_t num_tasks = chunks.count * blocks;
  const int64_t cost = 2 * in.x.size(0) * in.x.size(1) * channels / num_tasks;
  parallel_for(num_tasks, grain_rows(cost), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, channel = task % blocks * kBlockChannels;
      const int64_t width = channels - channel < kBlockChannels ? channels - channel : kBlockChannels;
      Scratch scratch;
      W *past = scratch.get<W>(past_rows * width), *pending = scratch.get<W>(past_rows * width);
      W* sums = scratch.get<W>((num_taps + 1) * width);
      for (int64_t s = chunks.begin(chunk); s < chunks.begin(chunk + 1); ++s) {
        const Segment& segment = segments[static_cast<size_t>(s)];
        const int64_t state_offset = (segment.sequence * channels + channel) * past_rows;
        load_past<T>(segment, initial == nullptr ? nullptr : initial + state_offset, past_rows, x, gate_in, channel,
                     width, past);
        for (int64_t i = 0; i < past_rows * width; ++i) pending[i] = 0;
        for (int64_t i = 0; i < (num_taps + 1) * width; ++i) sums[i] = 0;
        const int64_t b = segment.batch, t = segment.begin;
        const Backward<T> p{dy.at(b, t, channel),       x.at(b, t, channel),
                            gate_in.at(b, t, channel),  gate_out.at(b, t, channel),
                            dx.at(b, t, channel),       dgate_in.at(b, t, channel),
                            dgate_out.at(b, t, channel), dy.token,
                            x.token,                    gate_in.token,
                            gate_out.token,             dx.token,
                            filter + channel,           channels,
                            past,                       pending,
                            sums,                       width};
        backward_segment<T, kind>(p, num_taps, segment, dstate + state_offset,
                                  dfinal == nullptr ? nullptr : dfinal + state_offset);
        for (int64_t w = 0; w <= num_taps; ++w) {
          W* to = partial_data + (chunk * (num_taps + 1) + w) * channels + channel;
          sweep<V>(width, [=](int64_t i, auto lanes) {
            (V::load(to + i, lanes) + V::load(sums + w * width + i, lanes)).store(to + i, lanes);
          });
        }
      }
    }
  });
  add_chunks<V>(partial_data, chunks.count, (num_taps + 1) * channels, dtaps.mutable_data<W>());
}

Gradients run_backward(Kind kind, const Tensor& dy, const OptionalTensor& dfinal_any, const Streams& in,
                       const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
                       const OptionalTensor& cu_seqlens) {
  const std::vector<Segment> segments = cut(in.x, cu_seqlens);
  const int64_t sequences = segments.empty() ? 0 : segments.back().sequence + 1;
  const int64_t channels = in.x.size(2), num_taps = weight.size(1);
  check_filter(in.x, weight, bias, initial_state, sequences);
  check_filter(in.x, weight, bias, dfinal_any, sequences);
  require(dy.same_shape(in.x) && dy.dtype() == in.x.dtype(),
          "short convolution: dy must have the shape and dtype of x");
  const int64_t state_sizes[] = {sequences, channels, num_taps - 1};
  Gradients out;
  out.dx = empty_like(in.x);
  if (kind == Kind::kGated) {
    out.dgate_in = empty_like(in.x);
    out.dgate_out = empty_like(in.x);
  }
  dispatch_dtype(in.x.dtype(), [&](auto element) {
    using T = decltype(element);
    constexpr DType kWide = dtype_of<Wide<T>>();
    const Tensor rows = filter_rows<Wide<T>>(weight, bias);
    const Tensor state = initial_state ? cast(initial_state, kWide) : Tensor();
    const Tensor dfinal = dfinal_any ? cast(dfinal_any, kWide) : Tensor();
    out.dstate = empty(3, state_sizes, kWide);
    Tensor dtaps = empty({num_taps + 1, channels}, kWide);
    switch (kind) {
      case Kind::kPlain:
        convolve_backward<T, Kind::kPlain>(dy, dfinal, in, rows, state, segments, out, dtaps);
        break;
      case Kind::kSilu: convolve_backward<T, Kind::kSilu>(dy, dfinal, in, rows, state, segments, out, dtaps); break;
      case Kind::kGated:
        convolve_backward<T, Kind::kGated>(dy, dfinal, in, rows, state, segments, out, dtaps);
        break;
    }
    const Wide<T>* sums = dtaps.data<Wide<T>>();
    Tensor dweight = empty({channels, num_taps}, kWide);
    rows_to_state(sums, channels, num_taps, channels, dweight.mutable_data<Wide<T>>());
    out.dweight = cast(dweight, weight.dtype());
    Tensor dbias = empty({bias ? channels : 0}, kWide);
    for (int64_t c = 0; c < dbias.size(0); ++c) dbias.mutable_data<Wide<T>>()[c] = sums[num_taps * channels + c];
    out.dbias = bias ? cast(dbias, bias.dtype()) : std::move(dbias);
    if (initial_state) out.dstate = cast(out.dstate, initial_state.dtype());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& dy, const OptionalTensor& dfinal,
                                                                  const Tensor& x, const Tensor& weight,
                                                                  const OptionalTensor& bias, bool silu,
                                                                  const OptionalTensor& initial_state,
                                                                  const OptionalTensor& cu_seqlens) {
  require(x.dim() == 3, "causal_conv1d: x must be (B, T, D)");
  Gradients out = run_backward(silu ? Kind::kSilu : Kind::kPlain, last_contiguous(dy), dfinal,
                               {last_contiguous(x), Tensor(), Tensor()}, weight, bias, initial_state, cu_seqlens);
  return {std::move(out.dx), std::move(out.dweight), std::move(out.dbias), std::move(out.dstate)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_short_conv_backward(
    const Tensor& dy, const OptionalTensor& dfinal, const Tensor& x, const Tensor& gate_in, const Tensor& gate_out,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens) {
  require(x.dim() == 3, "gated_short_conv: x must be (B, T, D)");
  check_gates(x, gate_in, gate_out);
  Gradients out = run_backward(Kind::kGated, last_contiguous(dy), dfinal,
                               {last_contiguous(x), last_contiguous(gate_in), last_contiguous(gate_out)}, weight, bias,
                               initial_state, cu_seqlens);
  return {std::move(out.dx),      std::move(out.dgate_in), std::move(out.dgate_out),
          std::move(out.dweight), std::move(out.dbias),    std::move(out.dstate)};
}

STAR_OPERATOR("causal_conv1d_backward(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, bool silu, "
              "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)",
              causal_conv1d_backward);
STAR_OPERATOR("gated_short_conv_backward(Tensor dy, Tensor? dfinal, Tensor x, Tensor gate_in, Tensor gate_out, "
              "Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens) "
              "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
              gated_short_conv_backward);

}  // namespace
}  // namespace star
