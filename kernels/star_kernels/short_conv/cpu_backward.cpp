// Gradients of the short convolutions, in one sweep forward in time that recomputes what the forward did.
//
// With z the convolution's output and g = dL/dz, token t adds g_t u_{t - (W - 1) + w} to the gradient of tap w, and
// completes the gradient of the input W - 1 tokens before it: du_{t - (W - 1)} = sum_w tap_w g_{t - w}. So the sweep
// keeps the rows of u and g of the last W - 1 tokens, and goes on W - 1 tokens past a segment's end: over the next
// segment's g, or over zeros and the final state's gradient. What comes out before the sequence's first token is the
// initial state's gradient.
//
// Tokens are taken a whole row at a time, not kTile at a time as in the forward: up to seven streams are read and
// written here, and with kTile rows of each the processor's prefetchers lose track (4 read and 3 written, 28 MB: 16 GB/s
// against 40 row by row, Zen 4). Only the taps' gradients are summed kTile rows at a time, from rows still in cache.
// Tokens whose W - 1 before lie in the segment too, nearly all, take one loop (`interior_rows`); the others take a loop
// for each half, and the same operations in the same order.
#include "short_conv/tile.h"

namespace star {
namespace {

template <class T, Kind kind, class L> inline Vec<T> load_input(const Row<T>& p, int64_t i, L lanes, Wide<T>* new_u) {
  using V = Vec<T>;
  V input = V::load(p.x + i, lanes);
  if constexpr (kind == Kind::kGated) input = input * V::load(p.gate_in + i, lanes);
  if constexpr (kOwnInput<T, kind>) input.store(new_u + i, lanes);
  return input;
}

// g from z, and the outer gate's gradient for tokens that are the segment's own.
template <class T, Kind kind, class L>
inline Vec<T> load_output(const Row<T>& p, int64_t i, L lanes, Vec<T> z, Wide<T>* new_g, bool own, bool stream) {
  using V = Vec<T>;
  V g = V::load(p.dy + i, lanes);
  if constexpr (kind == Kind::kSilu) g = g * silu_slope(z, sigmoid(z));
  if constexpr (kind == Kind::kGated) {
    if (own) put(g * z, p.dgate_out + i, lanes, stream);
    g = g * V::load(p.gate_out + i, lanes);
  }
  if constexpr (kOwnOutput<T, kind>) g.store(new_g + i, lanes);
  return g;
}

template <class T, Kind kind, class L>
inline void store_input(const Row<T>& p, int64_t i, L lanes, Vec<T> du, bool stream) {
  using V = Vec<T>;
  if constexpr (kind == Kind::kGated) {
    put(du * V::load(p.past_x + i, lanes), p.dgate_in + i, lanes, stream);
    du = du * V::load(p.past_gate_in + i, lanes);
  }
  put(du, p.dx + i, lanes, stream);
}

// `count` tokens from t on, all of the segment, and W - 1 or more past its begin; `first`: the place of t in the tile.
template <class T, Kind kind, int kTaps>
void interior_rows(const Planes<T>& planes, const Block<T>& block, int64_t t, int64_t count, int64_t first,
                   History<Wide<T>>& u, History<Wide<T>>& g) {
  using V = Vec<T>;
  constexpr int kPast = kTaps - 1;
  const Wide<T>* taps = block.taps;
  const bool stream = block.stream;
  for (int64_t r = first; r < first + count; ++r, ++t) {
    const Row<T> p = planes.row(block.batch, t, kPast, block.channel);
    Wide<T>*new_u = u.slots[kPast + r], *new_g = g.slots[kPast + r];
    const Wide<T>*past_u[kTaps], *past_g[kTaps];
    STAR_UNROLL for (int w = 0; w < kPast; ++w) past_u[w] = u.rows[r + w], past_g[w] = g.rows[r + w];
    u.rows[kPast + r] = new_u;
    g.rows[kPast + r] = new_g;
    if constexpr (!kOwnInput<T, kind>) u.rows[kPast + r] = p.x;
    if constexpr (!kOwnOutput<T, kind>) g.rows[kPast + r] = p.dy;
    sweep<V>(block.channels, [=](int64_t i, auto lanes) {
      const Wide<T>* panel = taps + i * (kTaps + 1);
      V tap[kTaps];
      STAR_UNROLL for (int w = 0; w < kTaps; ++w) tap[w] = V::load(panel + w * V::N);
      V z(0);
      if constexpr (kind != Kind::kPlain || kOwnInput<T, kind>) {
        const V input = load_input<T, kind>(p, i, lanes, new_u);
        if constexpr (kind != Kind::kPlain) {
          z = V::load(panel + kTaps * V::N);
          STAR_UNROLL for (int w = 0; w < kPast; ++w) z = fma(tap[w], V::load(past_u[w] + i, lanes), z);
          z = fma(tap[kPast], input, z);
        }
      }
      V du = load_output<T, kind>(p, i, lanes, z, new_g, true, stream);
      du = tap[0] * du;
      STAR_UNROLL for (int w = 1; w < kTaps; ++w) du = fma(tap[w], V::load(past_g[kPast - w] + i, lanes), du);
      store_input<T, kind>(p, i, lanes, du, stream);
    });
  }
}

// u and g of one token; the first half of `interior_rows`, for any number of taps.
template <class T, Kind kind>
void output_row(const Row<T>& p, const Block<T>& block, int64_t r, History<Wide<T>>& u, History<Wide<T>>& g,
                bool own) {
  using V = Vec<T>;
  const int64_t past = block.num_taps - 1;
  Wide<T>*new_u = u.slots[past + r], *new_g = g.slots[past + r];
  const Wide<T>* const* rows = u.rows + r;
  u.rows[past + r] = new_u;
  g.rows[past + r] = new_g;
  if constexpr (!kOwnInput<T, kind>) u.rows[past + r] = p.x;
  if constexpr (!kOwnOutput<T, kind>) g.rows[past + r] = p.dy;
  if constexpr (!kOwnInput<T, kind> && !kOwnOutput<T, kind>) return;
  sweep<V>(block.channels, [&](int64_t i, auto lanes) {
    const Wide<T>* panel = block.taps + i * (past + 2);
    const V input = load_input<T, kind>(p, i, lanes, new_u);
    V z = V::load(panel + (past + 1) * V::N);
    if constexpr (kind != Kind::kPlain) {
      for (int64_t w = 0; w < past; ++w) z = fma(V::load(panel + w * V::N), V::load(rows[w] + i, lanes), z);
      z = fma(V::load(panel + past * V::N), input, z);
    }
    load_output<T, kind>(p, i, lanes, z, new_g, own, block.stream);
  });
}

// The second half, from the rows of g of W tokens. At a sequence's ends `dfinal`, if there is one, is added, and before
// the first token du belongs to the initial state. Both are states, W - 1 apart from channel to channel, or nullptr.
template <class T, Kind kind>
void input_row(const Row<T>& p, const Block<T>& block, const Wide<T>* const* g, Wide<T>* dstate,
               const Wide<T>* dfinal) {
  using V = Vec<T>;
  const int64_t past = block.num_taps - 1;
  sweep<V>(block.channels, [&](int64_t i, auto lanes) {
    const Wide<T>* panel = block.taps + i * (past + 2);
    V du = V::load(panel) * V::load(g[past] + i, lanes);
    for (int64_t w = 1; w <= past; ++w) {
      du = fma(V::load(panel + w * V::N), V::load(g[past - w] + i, lanes), du);
    }
    int64_t count = V::N;
    if constexpr (!decltype(lanes)::kFull) count = lanes.count;
    Wide<T> part[V::N];
    if (dfinal != nullptr) {
      for (int64_t c = 0; c < count; ++c) part[c] = dfinal[(i + c) * past];
      du = du + V::load(part, lanes);
    }
    if (dstate == nullptr) return store_input<T, kind>(p, i, lanes, du, block.stream);
    du.store(part, lanes);
    for (int64_t c = 0; c < count; ++c) dstate[(i + c) * past] = part[c];
  });
}

// Add g_t u_{t - (W - 1) + w} of `count` tokens to the gradient of tap w, and g_t to the bias's: panels of W + 1 rows.
template <class V, int kTaps, class W = typename V::Scalar>
void sum_taps(int64_t num_taps, int64_t count, int64_t channels, const W* const* u, const W* const* g, W* dtaps) {
  sweep<V>(channels, [=](int64_t i, auto lanes) {
    W* panel = dtaps + i * (num_taps + 1);
    if constexpr (kTaps > 0 && decltype(lanes)::kFull) {
      if (count == kTile) {
        V sums[kTaps + 1], window[kTaps - 1 + kTile];
        STAR_UNROLL for (int w = 0; w <= kTaps; ++w) sums[w] = V::load(panel + w * V::N);
        STAR_UNROLL for (int w = 0; w < kTaps - 1; ++w) window[w] = V::load(u[w] + i);
        STAR_UNROLL for (int r = 0; r < kTile; ++r) {
          window[kTaps - 1 + r] = V::load(u[kTaps - 1 + r] + i);
          const V now = V::load(g[r] + i);
          STAR_UNROLL for (int w = 0; w < kTaps; ++w) sums[w] = fma(now, window[r + w], sums[w]);
          sums[kTaps] = sums[kTaps] + now;
        }
        STAR_UNROLL for (int w = 0; w <= kTaps; ++w) sums[w].store(panel + w * V::N);
        return;
      }
    }
    for (int64_t w = 0; w <= num_taps; ++w) {
      V sum = V::load(panel + w * V::N);
      for (int64_t r = 0; r < count; ++r) {
        const V now = V::load(g[r] + i, lanes);
        sum = w == num_taps ? sum + now : fma(now, V::load(u[r + w] + i, lanes), sum);
      }
      sum.store(panel + w * V::N);
    }
  });
}

// The unrolled loops for W taps; `interior` is nullptr where there is only the general form: for W > 7, and for float64,
// which is not tuned. `tile` is nullptr there and with gates.
template <class T, Kind kind> struct Loops {
  decltype(&interior_rows<T, kind, 1>) interior = nullptr;
  decltype(&interior_tile<T, Kind::kPlain, 1>) tile = nullptr;
  decltype(&sum_taps<Vec<T>, 0>) sum = sum_taps<Vec<T>, 0>;

  template <int kTaps> void take() {
    interior = interior_rows<T, kind, kTaps>;
    if constexpr (kind != Kind::kGated) tile = interior_tile<T, kind, kTaps>;
    sum = sum_taps<Vec<T>, kTaps>;
  }
  explicit Loops(int64_t taps) {
    if constexpr (!std::is_same_v<T, double>) {
      switch (taps) {
        case 1: take<1>(); break;
        case 2: take<2>(); break;
        case 3: take<3>(); break;
        case 4: take<4>(); break;
        case 5: take<5>(); break;
        case 6: take<6>(); break;
        case 7: take<7>(); break;
        default: break;
      }
    }
  }
};

// One segment of one block of channels. `dstate` and `dfinal` are the states (channels, W - 1) of its sequence from the
// block's first channel on; `dtaps` panels of W + 1 rows.
template <class T, Kind kind>
void backward_segment(const Planes<T>& planes, const Block<T>& block, const Segment& segment, History<Wide<T>>& u,
                      History<Wide<T>>& g, Wide<T>* dstate, const Wide<T>* dfinal, Wide<T>* dtaps) {
  const int64_t past = block.num_taps - 1, row_bytes = block.channels * static_cast<int64_t>(sizeof(Wide<T>));
  const Loops<T, kind> loops(block.num_taps);
  const bool whole = loops.tile != nullptr && block.channels % Vec<T>::N == 0;
  const auto one = [&](int64_t t, int64_t r) {
    const int64_t before = t - past;
    const Row<T> p = planes.row(segment.batch, t, past, block.channel);
    if (t < segment.stop) {
      output_row<T, kind>(p, block, r, u, g, t < segment.end);
    } else {
      u.rows[past + r] = u.slots[past + r];
      g.rows[past + r] = g.slots[past + r];
      fill_zeros(g.slots[past + r], row_bytes);
    }
    const bool to_state = segment.begin == segment.start && before < segment.start;
    if (before < segment.begin && !to_state) return;
    input_row<T, kind>(p, block, g.rows + r, to_state ? dstate + (t - segment.start) : nullptr,
                       t >= segment.stop && dfinal != nullptr ? dfinal + (t - segment.stop) : nullptr);
  };
  g.restart();
  for (int64_t w = 0; w < past; ++w) fill_zeros(g.slots[w], row_bytes);
  for (int64_t t = segment.begin; t < segment.end + past; t += kTile) {
    const int64_t left = segment.end + past - t, count = left < kTile ? left : kTile;
    // Tokens of the segment, of which the first few may reach back before its begin.
    const int64_t own = segment.end - t < count ? segment.end - t : count;
    const int64_t reach = segment.begin + past - t, head = reach < 0 ? 0 : (reach < own ? reach : own);
    if (whole && head == 0 && own == kTile) {
      loops.tile(planes, block, t, u, g, dtaps);
      u.drop(kTile);
      g.drop(kTile);
      continue;
    }
    int64_t r = 0;
    if (loops.interior != nullptr && own > head) {
      for (; r < head; ++r) one(t + r, r);
      loops.interior(planes, block, t + r, own - r, r, u, g);
      r = own;
    }
    for (; r < count; ++r) one(t + r, r);
    if (own > 0) loops.sum(block.num_taps, own, block.channels, u.rows, g.rows + past, dtaps);
    u.drop(count);
    g.drop(count);
  }
}

struct Gradients {
  Tensor dx, dgate_in, dgate_out, dweight, dbias, dstate;
};

template <class T, Kind kind>
void convolve_backward(const Tensor& dy, const Tensor& dfinal_tensor, const Streams& in, const Tensor& filter,
                       int64_t num_taps, const Tensor& state, const std::vector<Segment>& segments, Gradients& out,
                       Tensor& dtaps) {
  using W = Wide<T>;
  using V = Vec<T>;
  const int64_t channels = in.x.size(2), past = num_taps - 1, blocks = blocks_of(channels);
  const Planes<T> planes{Plane<const T>(dy),          Plane<const T>(in.x), Plane<const T>(in.gate_in),
                         Plane<const T>(in.gate_out), Plane<T>(out.dx),     Plane<T>(out.dgate_in),
                         Plane<T>(out.dgate_out)};
  const W *taps = filter.data<W>(), *initial = state ? state.data<W>() : nullptr;
  const W* dfinal = dfinal_tensor ? dfinal_tensor.data<W>() : nullptr;
  W* dstate = out.dstate.mutable_data<W>();
  // Segments are summed within a chunk first, and the chunks after that, in an order that the sizes fix.
  const RowChunks chunks(static_cast<int64_t>(segments.size()), 1);
  Tensor partial = zeros({chunks.count, (num_taps + 1) * padded<V>(channels)}, dtype_of<W>());
  W* partial_data = partial.mutable_data<W>();
  const int64_t num_tasks = chunks.count * blocks;
  const bool stream = kind == Kind::kGated
                          ? stream_rows(out.dx, 7) && on_line(out.dgate_in.raw()) && on_line(out.dgate_out.raw())
                          : stream_rows(out.dx, 3);
  const int64_t cost = 2 * in.x.numel() / (num_tasks > 0 ? num_tasks : 1);
  parallel_for(num_tasks, grain_rows(cost), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, channel = task % blocks * kBlockChannels;
      const int64_t width = channels - channel < kBlockChannels ? channels - channel : kBlockChannels;
      const int64_t numbers = (num_taps + 1) * padded<V>(width);
      Scratch scratch;
      History<W> u(scratch, past, width), g(scratch, past, width);
      W* sums = scratch.get<W>(numbers);
      for (int64_t s = chunks.begin(chunk); s < chunks.begin(chunk + 1); ++s) {
        const Segment& segment = segments[static_cast<size_t>(s)];
        const int64_t offset = (segment.sequence * channels + channel) * past;
        u.restart();
        for (int64_t w = 0; w < past; ++w) {
          W* row = u.slots[w];
          past_input<T>(segment, initial == nullptr ? nullptr : initial + offset, past, planes.x, planes.gate_in,
                        channel, width, w,
                        [row](int64_t i, V value, auto lanes) { value.store(row + i, lanes); });
        }
        fill_zeros(sums, numbers * static_cast<int64_t>(sizeof(W)));
        const Block<T> block{segment.batch, channel, width, num_taps, taps + channel * (num_taps + 1), stream};
        backward_segment<T, kind>(planes, block, segment, u, g, dstate + offset,
                                  dfinal == nullptr ? nullptr : dfinal + offset, sums);
        W* to = partial_data + (chunk * padded<V>(channels) + channel) * (num_taps + 1);
        sweep<V>(numbers, [=](int64_t i, auto lanes) {
          (V::load(to + i, lanes) + V::load(sums + i, lanes)).store(to + i, lanes);
        });
      }
    }
    finish_streaming(stream);
  });
  add_chunks<V>(partial_data, chunks.count, (num_taps + 1) * padded<V>(channels), dtaps.mutable_data<W>());
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
    using V = Vec<T>;
    const Tensor filter = filter_panels<T>(weight, bias);
    const Tensor state = initial_state ? cast(initial_state, kWide) : Tensor();
    const Tensor dfinal = dfinal_any ? cast(dfinal_any, kWide) : Tensor();
    out.dstate = empty(3, state_sizes, kWide);
    Tensor dtaps = empty({(num_taps + 1) * padded<V>(channels)}, kWide);
    switch (kind) {
      case Kind::kPlain:
        convolve_backward<T, Kind::kPlain>(dy, dfinal, in, filter, num_taps, state, segments, out, dtaps);
        break;
      case Kind::kSilu: convolve_backward<T, Kind::kSilu>(dy, dfinal, in, filter, num_taps, state, segments, out, dtaps); break;
      case Kind::kGated:
        convolve_backward<T, Kind::kGated>(dy, dfinal, in, filter, num_taps, state, segments, out, dtaps);
        break;
    }
    const Wide<T>* sums = dtaps.data<Wide<T>>();
    Tensor dweight = empty({channels, num_taps}, kWide);
    from_panels<V>(sums, num_taps + 1, num_taps, channels, dweight.mutable_data<Wide<T>>());
    out.dweight = cast(dweight, weight.dtype());
    Tensor dbias = empty({bias ? channels : 0}, kWide);
    Wide<T>* dbias_data = dbias.mutable_data<Wide<T>>();
    sweep<V>(dbias.size(0), [=](int64_t i, auto lanes) {
      V::load(sums + i * (num_taps + 1) + num_taps * V::N, lanes).store(dbias_data + i, lanes);
    });
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
