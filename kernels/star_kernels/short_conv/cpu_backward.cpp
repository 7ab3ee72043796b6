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
#include "short_conv/conv.h"

namespace star {
namespace {

// One token of a block of channels. Passed by value, as Forward.
template <class T> struct Row {
  const T *dy, *x, *gate_in, *gate_out;
  T *dx, *dgate_in, *dgate_out;
  int64_t channels;
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

// u and g of one token. `u` points to the rows of W tokens, of which the last is written here, or was there already:
// for float and double without a gate x itself is u, and without an activation dy itself is g.
template <class T, Kind kind> constexpr bool kOwnInput = kind == Kind::kGated || sizeof(T) != sizeof(Wide<T>);
template <class T, Kind kind> constexpr bool kOwnOutput = kind != Kind::kPlain || sizeof(T) != sizeof(Wide<T>);

template <class T, Kind kind, int kTaps>
void output_row(Row<T> p, int64_t num_taps, const Wide<T>* taps, const Wide<T>* const* past, Wide<T>* new_u,
                Wide<T>* new_g, bool own) {
  using V = Vec<T>;
  const int64_t count = kTaps > 0 ? kTaps : num_taps;
  const Wide<T>* u[kTaps > 0 ? kTaps : 1];
  STAR_UNROLL for (int w = 0; w < kTaps - 1; ++w) u[w] = past[w];
  sweep<V>(p.channels, [=](int64_t i, auto lanes) {
    V input = V::load(p.x + i, lanes);
    if constexpr (kind == Kind::kGated) input = input * V::load(p.gate_in + i, lanes);
    if constexpr (kOwnInput<T, kind>) input.store(new_u + i, lanes);
    V g = V::load(p.dy + i, lanes);
    if constexpr (kind != Kind::kPlain) {
      const Wide<T>* panel = taps + i * (count + 1);
      V z = V::load(panel + count * V::N);
      if constexpr (kTaps > 0) {
        STAR_UNROLL for (int w = 0; w < kTaps - 1; ++w) z = fma(V::load(panel + w * V::N), V::load(u[w] + i, lanes), z);
      } else {
        for (int64_t w = 0; w < count - 1; ++w) z = fma(V::load(panel + w * V::N), V::load(past[w] + i, lanes), z);
      }
      z = fma(V::load(panel + (count - 1) * V::N), input, z);
      if constexpr (kind == Kind::kSilu) {
        const V s = sigmoid(z);
        g = g * (s * fma(z, V(1) - s, V(1)));
      } else {
        if (own) (g * z).store(p.dgate_out + i, lanes);
        g = g * V::load(p.gate_out + i, lanes);
      }
    }
    if constexpr (kOwnOutput<T, kind>) g.store(new_g + i, lanes);
  });
}

// du of a token from the rows of g of the W tokens it reaches, its own first.
template <class V, int kTaps, class L, class W = typename V::Scalar>
inline V input_gradient(int64_t num_taps, const W* panel, const W* const* g, int64_t i, L lanes) {
  const int64_t count = kTaps > 0 ? kTaps : num_taps;
  V du = V::load(panel) * V::load(g[count - 1] + i, lanes);
  if constexpr (kTaps > 0) {
    STAR_UNROLL for (int w = 1; w < kTaps; ++w) {
      du = fma(V::load(panel + w * V::N), V::load(g[kTaps - 1 - w] + i, lanes), du);
    }
  } else {
    for (int64_t w = 1; w < count; ++w) {
      du = fma(V::load(panel + w * V::N), V::load(g[count - 1 - w] + i, lanes), du);
    }
  }
  return du;
}

template <class T, Kind kind, class L> inline void finish_input(const Row<T>& p, int64_t i, L lanes, Vec<T> du) {
  using V = Vec<T>;
  if constexpr (kind == Kind::kGated) {
    (du * V::load(p.x + i, lanes)).store(p.dgate_in + i, lanes);
    du = du * V::load(p.gate_in + i, lanes);
  }
  du.store(p.dx + i, lanes);
}

template <class T, Kind kind, int kTaps>
void input_row(Row<T> p, int64_t num_taps, const Wide<T>* taps, const Wide<T>* const* rows) {
  using V = Vec<T>;
  const int64_t count = kTaps > 0 ? kTaps : num_taps;
  const Wide<T>* g[kTaps > 0 ? kTaps : 1];
  STAR_UNROLL for (int w = 0; w < kTaps; ++w) g[w] = rows[w];
  sweep<V>(p.channels, [=](int64_t i, auto lanes) {
    const V du =
        input_gradient<V, kTaps>(num_taps, taps + i * (count + 1), kTaps > 0 ? g : rows, i, lanes);
    finish_input<T, kind>(p, i, lanes, du);
  });
}

// The same at a sequence's ends: `dfinal`, if there is one, is added, and before the first token du belongs to the
// initial state. Both are states, W - 1 apart from channel to channel.
template <class T, Kind kind>
void edge_row(Row<T> p, int64_t num_taps, const Wide<T>* taps, const Wide<T>* const* g, Wide<T>* dstate,
              const Wide<T>* dfinal) {
  using V = Vec<T>;
  const int64_t step = num_taps - 1;
  sweep<V>(p.channels, [&](int64_t i, auto lanes) {
    V du = input_gradient<V, 0>(num_taps, taps + i * (num_taps + 1), g, i, lanes);
    int64_t count = V::N;
    if constexpr (!decltype(lanes)::kFull) count = lanes.count;
    Wide<T> part[V::N];
    if (dfinal != nullptr) {
      for (int64_t c = 0; c < count; ++c) part[c] = dfinal[(i + c) * step];
      du = du + V::load(part, lanes);
    }
    if (dstate == nullptr) return finish_input<T, kind>(p, i, lanes, du);
    du.store(part, lanes);
    for (int64_t c = 0; c < count; ++c) dstate[(i + c) * step] = part[c];
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

// The loops for W taps: unrolled up to 7 and general above, as for float64, which is not tuned.
template <class T, Kind kind> struct Loops {
  decltype(&output_row<T, kind, 0>) output;
  decltype(&input_row<T, kind, 0>) input;
  decltype(&sum_taps<Vec<T>, 0>) sum;

  template <int kTaps> static Loops of() {
    return {output_row<T, kind, kTaps>, input_row<T, kind, kTaps>, sum_taps<Vec<T>, kTaps>};
  }
  explicit Loops(int64_t taps) : Loops(of<0>()) {
    if constexpr (!std::is_same_v<T, double>) {
      switch (taps) {
        case 1: *this = of<1>(); break;
        case 2: *this = of<2>(); break;
        case 3: *this = of<3>(); break;
        case 4: *this = of<4>(); break;
        case 5: *this = of<5>(); break;
        case 6: *this = of<6>(); break;
        case 7: *this = of<7>(); break;
        default: break;
      }
    }
  }

 private:
  Loops(decltype(output) o, decltype(input) i, decltype(sum) s) : output(o), input(i), sum(s) {}
};

// The tensors along time of one call.
template <class T> struct Planes {
  Plane<const T> dy, x, gate_in, gate_out;
  Plane<T> dx, dgate_in, dgate_out;

  Row<T> row(const Segment& segment, int64_t t, int64_t channel, int64_t channels) const {
    const int64_t b = segment.batch;
    return {dy.at(b, t, channel),       x.at(b, t, channel),  gate_in.at(b, t, channel),
            gate_out.at(b, t, channel), dx.at(b, t, channel), dgate_in.at(b, t, channel),
            dgate_out.at(b, t, channel), channels};
  }
};

// One segment of one block of channels. `dstate` and `dfinal` are the states (channels, W - 1) of its sequence from
// `channel` on; `dtaps` panels of W + 1 rows.
template <class T, Kind kind>
void backward_segment(const Planes<T>& planes, const Segment& segment, int64_t num_taps, const Wide<T>* taps,
                      int64_t channel, int64_t channels, History<Wide<T>>& u, History<Wide<T>>& g, Wide<T>* dstate,
                      const Wide<T>* dfinal, Wide<T>* dtaps) {
  const int64_t past = num_taps - 1;
  const Loops<T, kind> loops(num_taps);
  const auto zero = [channels](Wide<T>* row) {
    fill_zeros(row, channels * static_cast<int64_t>(sizeof(Wide<T>)));
    return row;
  };
  g.restart();
  for (int64_t w = 0; w < past; ++w) zero(g.slots[w]);
  for (int64_t t = segment.begin; t < segment.end + past; t += kTile) {
    const int64_t left = segment.end + past - t, count = left < kTile ? left : kTile;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t now = t + r, before = now - past;
      if (now < segment.stop) {
        const Row<T> p = planes.row(segment, now, channel, channels);
        u.rows[past + r] = u.slots[past + r];
        g.rows[past + r] = g.slots[past + r];
        if constexpr (!kOwnInput<T, kind>) u.rows[past + r] = p.x;
        if constexpr (!kOwnOutput<T, kind>) g.rows[past + r] = p.dy;
        if constexpr (kOwnInput<T, kind> || kOwnOutput<T, kind>) {
          loops.output(p, num_taps, taps, u.rows + r, u.slots[past + r], g.slots[past + r], now < segment.end);
        }
      } else {
        u.rows[past + r] = u.slots[past + r];
        g.rows[past + r] = zero(g.slots[past + r]);
      }
      const bool inside = before >= segment.begin;
      const bool to_state = segment.begin == segment.start && before < segment.start;
      const bool from_state = now >= segment.stop && dfinal != nullptr;
      if (to_state || (inside && from_state)) {
        edge_row<T, kind>(inside ? planes.row(segment, before, channel, channels) : Row<T>{{}, {}, {}, {}, {}, {}, {}, channels},
                          num_taps, taps, g.rows + r, to_state ? dstate + (now - segment.start) : nullptr,
                          from_state ? dfinal + (now - segment.stop) : nullptr);
      } else if (inside) {
        loops.input(planes.row(segment, before, channel, channels), num_taps, taps, g.rows + r);
      }
    }
    const int64_t own = segment.end - t < count ? segment.end - t : count;
    if (own > 0) loops.sum(num_taps, own, channels, u.rows, g.rows + past, dtaps);
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
  const int64_t cost = 2 * in.x.size(0) * in.x.size(1) * channels / (num_tasks > 0 ? num_tasks : 1);
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
        backward_segment<T, kind>(planes, segment, num_taps, taps + channel * (num_taps + 1), channel, width, u, g,
                                  dstate + offset, dfinal == nullptr ? nullptr : dfinal + offset, sums);
        W* to = partial_data + (chunk * padded<V>(channels) + channel) * (num_taps + 1);
        sweep<V>(numbers, [=](int64_t i, auto lanes) {
          (V::load(to + i, lanes) + V::load(sums + i, lanes)).store(to + i, lanes);
        });
      }
    }
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
