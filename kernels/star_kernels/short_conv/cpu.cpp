// Short causal convolutions, forward and one-token step: y_t = act(bias + sum_w tap_w u_{t - (W - 1) + w}), with u = x,
// or gated, u = gate_in * x and y = gate_out * (...), in one pass over the inputs.
#include "short_conv/conv.h"

namespace star {
namespace {

// A run of tokens of one sequence, and a block of its channels. Passed by value: after a store through a pointer the
// compiler would read the fields of a reference again, which cost as much as the arithmetic.
template <class T> struct Forward {
  const T *x, *gate_in, *gate_out;
  T* y;
  int64_t x_step, in_step, out_step, y_step;  // elements between tokens
  const Wide<T>* taps;                        // panels of W + 1 rows
  Wide<T>* past;                              // panels of W - 1 rows
  int64_t channels;
  bool stream;

  // To the next token.
  template <Kind kind> void next() {
    advance(x, x_step);
    advance(y, y_step);
    if constexpr (kind == Kind::kGated) {
      advance(gate_in, in_step);
      advance(gate_out, out_step);
    }
  }
  // To other channels: a multiple of the vector's length.
  template <Kind kind> void skip(int64_t number, int64_t num_taps) {
    x += number;
    y += number;
    if constexpr (kind == Kind::kGated) {
      gate_in += number;
      gate_out += number;
    }
    taps += number * (num_taps + 1);
    past += number * (num_taps - 1);
  }
};

template <class T, Kind kind, class L> inline Vec<T> input(const Forward<T>& p, int64_t i, L lanes) {
  const Vec<T> x = Vec<T>::load(p.x + i, lanes);
  if constexpr (kind != Kind::kGated) return x;
  return x * Vec<T>::load(p.gate_in + i, lanes);
}

template <class T, Kind kind, class L> inline void output(const Forward<T>& p, L lanes, Vec<T> sum) {
  if constexpr (kind == Kind::kSilu) sum = silu(sum);
  if constexpr (kind == Kind::kGated) sum = sum * Vec<T>::load(p.gate_out, lanes);
  put(sum, p.y, lanes, p.stream);
}

// kTile tokens of two vectors of half a line each, see `kPairs`.
template <class T, Kind kind, int kTaps> inline void forward_pair(Forward<T> p) {
  using V = Vec<T>;
  constexpr int kPast = kTaps - 1;
  V inputs[2][kPast + kTile], sums[2][kTile];
  STAR_UNROLL for (int r = 0; r < kTile; ++r) {
    // The next tile's part: rows are too short, or too far apart, for the processor to be there in time.
    __builtin_prefetch(p.x + kTile * p.x_step, 0, 2);
    if constexpr (kind == Kind::kGated) {
      __builtin_prefetch(p.gate_in + kTile * p.in_step, 0, 2);
    }
    STAR_UNROLL for (int h = 0; h < 2; ++h) inputs[h][kPast + r] = input<T, kind>(p, h * V::N, Full{});
    advance(p.x, p.x_step);
    if constexpr (kind == Kind::kGated) advance(p.gate_in, p.in_step);
  }
  for (int h = 0; h < 2; ++h) {
    const Wide<T>* panel = p.taps + h * V::N * (kTaps + 1);
    Wide<T>* past = p.past + h * V::N * kPast;
    V taps[kTaps], power[kTile], *in = inputs[h], *sum = sums[h];
    STAR_UNROLL for (int w = 0; w < kTaps; ++w) taps[w] = V::load(panel + w * V::N);
    STAR_UNROLL for (int w = 0; w < kPast; ++w) {
      in[w] = V::load(past + w * V::N);
      in[kTile + w].store(past + w * V::N);
    }
    const V bias = V::load(panel + kTaps * V::N);
    STAR_UNROLL for (int r = 0; r < kTile; ++r) {
      sum[r] = bias;
      STAR_UNROLL for (int w = 0; w < kTaps; ++w) sum[r] = fma(taps[w], in[r + w], sum[r]);
    }
    if constexpr (kind == Kind::kSilu) {
      STAR_UNROLL for (int r = 0; r < kTile; ++r) power[r] = sigmoid_power(sum[r]);
      STAR_UNROLL for (int r = 0; r < kTile; ++r) sum[r] = sum[r] * sigmoid_from(power[r]);
    }
  }
  STAR_UNROLL for (int r = 0; r < kTile; ++r) {
    STAR_UNROLL for (int h = 0; h < 2; ++h) {
      V sum = sums[h][r];
      if constexpr (kind == Kind::kGated) sum = sum * V::load(p.gate_out + h * V::N);
      put(sum, p.y + h * V::N, Full{}, p.stream);
    }
    advance(p.y, p.y_step);
    if constexpr (kind == Kind::kGated) advance(p.gate_out, p.out_step);
  }
}

// kTile tokens of the whole vectors of channels.
template <class T, Kind kind, int kTaps> void forward_tile(Forward<T> p) {
  using V = Vec<T>;
  int64_t i = 0;
  if constexpr (kPairs<V>) {
    for (; i + 2 * V::N <= p.channels; i += 2 * V::N) {
      forward_pair<T, kind, kTaps>(p);
      p.template skip<kind>(2 * V::N, kTaps);
    }
  }
  for (; i + V::N <= p.channels; i += V::N) {
    V taps[kTaps], window[kTaps - 1 + kTile];
    STAR_UNROLL for (int w = 0; w < kTaps; ++w) taps[w] = V::load(p.taps + w * V::N);
    STAR_UNROLL for (int w = 0; w < kTaps - 1; ++w) window[w] = V::load(p.past + w * V::N);
    const V bias = V::load(p.taps + kTaps * V::N);
    Forward<T> at = p;
    STAR_UNROLL for (int r = 0; r < kTile; ++r) {
      window[kTaps - 1 + r] = input<T, kind>(at, 0, Full{});
      V sum = bias;
      STAR_UNROLL for (int w = 0; w < kTaps; ++w) sum = fma(taps[w], window[r + w], sum);
      output<T, kind>(at, Full{}, sum);
      at.template next<kind>();
    }
    STAR_UNROLL for (int w = 0; w < kTaps - 1; ++w) window[kTile + w].store(p.past + w * V::N);
    p.template skip<kind>(V::N, kTaps);
  }
}

// One token, any number of taps; the same operations in the same order.
template <class T, Kind kind> void forward_token(Forward<T> p, int64_t num_taps) {
  using V = Vec<T>;
  const int64_t history = num_taps - 1;
  sweep<V>(p.channels, [&](int64_t, auto lanes) {
    V sum = V::load(p.taps + num_taps * V::N);
    for (int64_t w = 0; w < history; ++w) {
      const V value = V::load(p.past + w * V::N);
      sum = fma(V::load(p.taps + w * V::N), value, sum);
      if (w > 0) value.store(p.past + (w - 1) * V::N);
    }
    const V value = input<T, kind>(p, 0, lanes);
    sum = fma(V::load(p.taps + history * V::N), value, sum);
    if (history > 0) value.store(p.past + (history - 1) * V::N);
    output<T, kind>(p, lanes, sum);
    if constexpr (decltype(lanes)::kFull) p.template skip<kind>(V::N, num_taps);
  });
}

// The unrolled tile for W taps; none for W > 7, nor for float64, which is not tuned.
template <class T, Kind kind> void (*forward_tile_for(int64_t taps))(Forward<T>) {
  if constexpr (!std::is_same_v<T, double>) {
    switch (taps) {
      case 1: return forward_tile<T, kind, 1>;
      case 2: return forward_tile<T, kind, 2>;
      case 3: return forward_tile<T, kind, 3>;
      case 4: return forward_tile<T, kind, 4>;
      case 5: return forward_tile<T, kind, 5>;
      case 6: return forward_tile<T, kind, 6>;
      case 7: return forward_tile<T, kind, 7>;
      default: break;
    }
  }
  return nullptr;
}

template <class T, Kind kind> void forward_run(Forward<T> p, int64_t num_taps, int64_t tokens) {
  using V = Vec<T>;
  const auto tile = forward_tile_for<T, kind>(num_taps);
  const int64_t whole = p.channels / V::N * V::N;
  if (tile != nullptr && whole > 0) {
    for (; tokens >= kTile; tokens -= kTile) {
      tile(p);
      // The channels that fill no vector, and the tokens that fill no tile, go one by one.
      Forward<T> rest = p;
      rest.template skip<kind>(whole, num_taps);
      rest.channels -= whole;
      for (int r = 0; r < kTile; ++r, p.template next<kind>(), rest.template next<kind>()) {
        if (whole < p.channels) forward_token<T, kind>(rest, num_taps);
      }
    }
  }
  for (; tokens > 0; --tokens, p.template next<kind>()) forward_token<T, kind>(p, num_taps);
}

template <class T, Kind kind>
void convolve(const Streams& in, const Tensor& filter, int64_t history, const Tensor& state, const std::vector<Segment>& segments,
              Tensor& y, Tensor& final_state) {
  using W = Wide<T>;
  using V = Vec<T>;
  const int64_t channels = in.x.size(2);
  const int64_t blocks = blocks_of(channels), num_tasks = static_cast<int64_t>(segments.size()) * blocks;
  const Plane<const T> x(in.x), gate_in(in.gate_in), gate_out(in.gate_out);
  const Plane<T> out(y);
  const W *taps = filter.data<W>(), *initial = state ? state.data<W>() : nullptr;
  W* final_data = final_state.mutable_data<W>();
  const int64_t cost = in.x.numel() / (num_tasks > 0 ? num_tasks : 1);
  const bool stream = stream_rows(y, kind == Kind::kGated ? 4 : 2);
  parallel_for(num_tasks, grain_rows(cost), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Segment& segment = segments[static_cast<size_t>(task / blocks)];
      const int64_t channel = task % blocks * kBlockChannels;
      const int64_t width = channels - channel < kBlockChannels ? channels - channel : kBlockChannels;
      const int64_t state_offset = (segment.sequence * channels + channel) * history;
      Scratch scratch;
      W* past = scratch.get<W>(history * padded<V>(width));
      for (int64_t w = 0; w < history; ++w) {
        past_input<T>(segment, initial == nullptr ? nullptr : initial + state_offset, history, x, gate_in, channel,
                      width, w, [=](int64_t i, V value, auto) { value.store(past + i * history + w * V::N); });
      }
      const int64_t b = segment.batch, t = segment.begin;
      forward_run<T, kind>(
          {x.at(b, t, channel), gate_in.at(b, t, channel), gate_out.at(b, t, channel), out.at(b, t, channel), x.token,
           gate_in.token, gate_out.token, out.token, taps + channel * (history + 2), past, width,
           stream},
          history + 1, segment.end - segment.begin);
      if (segment.end == segment.stop) from_panels<V>(past, history, history, width, final_data + state_offset);
    }
    finish_streaming(stream);
  });
}

std::tuple<Tensor, Tensor> run(Kind kind, Streams in, const Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  const std::vector<Segment> segments = cut(in.x, cu_seqlens);
  const int64_t sequences = segments.empty() ? 0 : segments.back().sequence + 1;
  const int64_t state_sizes[] = {sequences, in.x.size(2), weight.size(1) - 1};
  check_filter(in.x, weight, bias, initial_state, sequences);
  Tensor y = empty_like(in.x);
  Tensor final_state;
  dispatch_dtype(in.x.dtype(), [&](auto element) {
    using T = decltype(element);
    const Tensor filter = filter_panels<T>(weight, bias);
    const int64_t history = weight.size(1) - 1;
    const Tensor state = initial_state ? cast(initial_state, dtype_of<Wide<T>>()) : Tensor();
    final_state = empty(3, state_sizes, dtype_of<Wide<T>>());
    switch (kind) {
      case Kind::kPlain: return convolve<T, Kind::kPlain>(in, filter, history, state, segments, y, final_state);
      case Kind::kSilu: return convolve<T, Kind::kSilu>(in, filter, history, state, segments, y, final_state);
      case Kind::kGated: return convolve<T, Kind::kGated>(in, filter, history, state, segments, y, final_state);
    }
  });
  return {std::move(y), std::move(final_state)};
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  require(x.dim() == 3, "causal_conv1d: x must be (B, T, D)");
  return run(silu ? Kind::kSilu : Kind::kPlain, {last_contiguous(x), Tensor(), Tensor()}, weight, bias, initial_state,
             cu_seqlens);
}

std::tuple<Tensor, Tensor> gated_short_conv(const Tensor& x, const Tensor& gate_in, const Tensor& gate_out,
                                            const Tensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  require(x.dim() == 3, "gated_short_conv: x must be (B, T, D)");
  check_gates(x, gate_in, gate_out);
  return run(Kind::kGated, {last_contiguous(x), last_contiguous(gate_in), last_contiguous(gate_out)}, weight, bias,
             initial_state, cu_seqlens);
}

STAR_OPERATOR("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, "
              "Tensor? cu_seqlens) -> (Tensor, Tensor)",
              causal_conv1d);
STAR_OPERATOR("gated_short_conv(Tensor x, Tensor gate_in, Tensor gate_out, Tensor weight, Tensor? bias, "
              "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
              gated_short_conv);

}  // namespace
}  // namespace star
