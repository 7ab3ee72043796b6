// Mamba-1's selective scan, forward and backward. A task takes 64 channels of one group and one sequence through time,
// in blocks of 64 tokens; its states stay in the first-level cache between blocks and in registers within one.
//
// Sums over channels (the gradients of B and C) are taken over a task's channels by one thread and then over tasks in
// order, so they do not depend on the number of threads.
#include "recurrence/selective.h"

namespace star {
namespace {

constexpr double kLog2E = 1.44269504088896341, kLn2 = 0.693147180559945309;

struct Sizes {
  int64_t batch, length, width, groups, states, group_width;
  int64_t part_width, parts;  // a group's channels are cut into parts, one a task

  Sizes(const Tensor& x, const Tensor& A, const Tensor& B) {
    require(x.dim() == 3 && A.dim() == 2 && B.dim() == 4,
            "selective_scan: x must be (B, T, D), A (D, N), B (B, T, G, N)");
    batch = x.size(0);
    length = x.size(1);
    width = x.size(2);
    groups = B.size(2);
    states = A.size(1);
    require(groups > 0 && width % groups == 0 && A.size(0) == width && B.size(0) == batch && B.size(1) == length &&
                B.size(3) == states,
            "selective_scan: A must be (D, N) and B (B, T, G, N) with G a divisor of D");
    group_width = width / groups;
    // Wider parts mean fewer sums over lanes and fewer partial results, narrower ones more tasks.
    part_width = group_width < 1024 ? 64 : 128;
    parts = (group_width + part_width - 1) / part_width;
  }
};

// A task's share: channels [first, first + channels) of one sequence.
struct Share {
  int64_t sequence, row, begin, end, group, part, first, channels;

  Share(int64_t task, const Sizes& sizes, const Sequences& sequences) {
    part = task % sizes.parts;
    group = task / sizes.parts % sizes.groups;
    sequence = task / (sizes.parts * sizes.groups);
    row = sequences.row(sequence);
    begin = sequences.begin(sequence);
    end = sequences.end(sequence);
    first = group * sizes.group_width + part * sizes.part_width;
    const int64_t left = sizes.group_width - part * sizes.part_width;
    channels = left < sizes.part_width ? left : sizes.part_width;
  }
};

// The arguments as the kernels read them; absent ones are null. Activations are of type T: where they differ from x in
// dtype, all of them become float32 (float64 for float64).
struct Arguments {
  Tensor x, dt, z, A, B, C, D, bias;
  bool softplus;

  Arguments(const Tensor& x_any, const Tensor& dt_any, const Tensor& A_any, const Tensor& B_any, const Tensor& C_any,
            const OptionalTensor& D_any, const OptionalTensor& z_any, const OptionalTensor& bias_any, bool dt_softplus)
      : softplus(dt_softplus) {
    const DType wide = x_any.dtype() == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const bool mixed = dt_any.dtype() != x_any.dtype() || (z_any && z_any.dtype() != x_any.dtype());
    const auto activation = [&](const Tensor& one) {
      require(one.same_shape(x_any), "selective_scan: dt and z must have the shape of x");
      return mixed ? cast(one, wide) : last_contiguous(one);
    };
    const auto per_channel = [&](const Tensor& one) {
      require(one.dim() == 1 && one.size(0) == x_any.size(-1), "selective_scan: D and dt_bias must be (D,)");
      return cast(one, wide);
    };
    require(C_any.same_shape(B_any), "selective_scan: C must have the shape of B");
    x = activation(x_any);
    dt = activation(dt_any);
    if (z_any) z = activation(z_any);
    A = cast(A_any, wide);
    B = cast(B_any, wide);
    C = cast(C_any, wide);
    if (D_any) D = per_channel(D_any);
    if (bias_any) bias = per_channel(bias_any);
  }
};

template <class T> struct Inputs {
  using W = Wide<T>;
  Sizes sizes;
  Track<T> x, dt, z;
  const W *A, *B, *C, *D, *bias;
  bool softplus;

  Inputs(const Arguments& from, const Sizes& all)
      : sizes(all),
        x(from.x),
        dt(from.dt),
        z(from.z),
        A(from.A.data<W>()),
        B(from.B.data<W>()),
        C(from.C.data<W>()),
        D(from.D ? from.D.data<W>() : nullptr),
        bias(from.bias ? from.bias.data<W>() : nullptr),
        softplus(from.softplus) {}

  int64_t group_offset(const Share& share, int64_t t) const {
    return ((share.row * sizes.length + t) * sizes.groups + share.group) * sizes.states;
  }
};

template <class V, class F> inline void with_lanes(int64_t channels, F&& body) {
  if constexpr (V::N > 1) {
    if (channels < V::N) return body(Lanes{static_cast<int>(channels)});
  }
  body(Full{});
}

template <class V, class L> V load_optional(const typename V::Scalar* data, int64_t i, L lanes) {
  return data != nullptr ? V::load(data + i, lanes) : V(typename V::Scalar(0));
}

// What comes before the states, for one block of a tile, all [token][lane].
template <class W> struct Prepared {
  W *x, *step_size, *driven;  // x, s = softplus(dt + bias), s x
  // Backward alone:
  W *slope, *dy, *dz;  // ds / d dt, the gradient at C . h + D x, and that at z over C . h + D x
};

template <class V> inline V softplus_and_slope(V x, V& slope) {
  if constexpr (V::N == 1) {
    slope = sigmoid(x);
    return softplus(x);
  } else {
    // Both from exp(-|x|), as in math.h.
    const V e = exp(-abs(x));
    slope = select(x >= V(0.0f), V(1.0f), e) / (V(1.0f) + e);
    return max(V(0.0f), x) + log1p_unit(e);
  }
}

// What to ask for during a tile's passes: its outputs, and the inputs of the tile after it.
class Wanted {
 public:
  explicit Wanted(const void* at_hand) : at_hand_(static_cast<const char*>(at_hand)) {}

  template <class T> void add(const T* first, int64_t step) {
    list_[count_++] = {reinterpret_cast<const char*>(first), step * static_cast<int64_t>(sizeof(T))};
  }
  template <class T> void add(const Track<T>& track, int64_t row, int64_t t, int64_t channel) {
    if (track) add(track.at(row, t) + channel, track.time);
  }
  Ahead take() { return taken_ < count_ ? list_[taken_++] : Ahead{at_hand_, 0}; }
  // What no pass has taken.
  void rest(int64_t tokens) {
    while (taken_ < count_) {
      Ahead ahead = take();
      for (int64_t t = 0; t < tokens; ++t) ahead.next();
    }
  }

 private:
  static constexpr int kMost = 7;
  const char* at_hand_;
  Ahead list_[kMost];
  int count_ = 0, taken_ = 0;
};

template <class T, class L>
void prepare(const Inputs<T>& in, int64_t row, int64_t begin, int64_t tokens, int64_t channel, L lanes,
             const Prepared<Wide<T>>& to) {
  using V = Vec<T>;
  const V bias = load_optional<V>(in.bias, channel, lanes);
  for (int64_t t = 0; t < tokens; ++t) {
    const T *x_data = in.x.at(row, begin + t) + channel, *dt_data = in.dt.at(row, begin + t) + channel;
    const V raw = V::load(dt_data, lanes) + bias, x = V::load(x_data, lanes);
    const V s = in.softplus ? softplus(raw) : raw;
    x.store(to.x + t * V::N);
    s.store(to.step_size + t * V::N);
    (s * x).store(to.driven + t * V::N);
  }
}

// `dy_track` may be null.
template <class T, class L>
void prepare_backward(const Inputs<T>& in, const Track<T>& dy_track, int64_t row, int64_t begin, int64_t tokens,
                      int64_t channel, L lanes, const Prepared<Wide<T>>& to) {
  using V = Vec<T>;
  using W = Wide<T>;
  const V bias = load_optional<V>(in.bias, channel, lanes);
  for (int64_t t = 0; t < tokens; ++t) {
    const T *x_data = in.x.at(row, begin + t) + channel, *dt_data = in.dt.at(row, begin + t) + channel;
    const V raw = V::load(dt_data, lanes) + bias, x = V::load(x_data, lanes);
    V s = raw, slope(W(1)), dy(W(0)), dz(W(0));
    if (in.softplus) s = softplus_and_slope(raw, slope);
    if (dy_track) dy = V::load(dy_track.at(row, begin + t) + channel, lanes);
    if (in.z) {
      const V z = V::load(in.z.at(row, begin + t) + channel, lanes), open = sigmoid(z);
      dz = dy * open * fma(z, V(W(1)) - open, V(W(1)));
      dy = dy * (z * open);
    }
    x.store(to.x + t * V::N);
    s.store(to.step_size + t * V::N);
    (s * x).store(to.driven + t * V::N);
    slope.store(to.slope + t * V::N);
    dy.store(to.dy + t * V::N);
    dz.store(to.dz + t * V::N);
  }
}

// y = (C . h + D x) silu(z), from `x` and C . h in `inner`.
template <class T, class L>
void store_outputs(const Inputs<T>& in, int64_t row, int64_t begin, int64_t tokens, int64_t channel, L lanes,
                   const Wide<T>* x, const Wide<T>* inner, T* y) {
  using V = Vec<T>;
  const V skip = load_optional<V>(in.D, channel, lanes);
  for (int64_t t = 0; t < tokens; ++t) {
    V value = V::load(inner + t * V::N);
    if (in.D != nullptr) value = fma(skip, V::load(x + t * V::N), value);
    if (in.z) value = value * silu(V::load(in.z.at(row, begin + t) + channel, lanes));
    value.store(y + (row * in.sizes.length + begin + t) * in.sizes.width + channel, lanes);
  }
}

inline int64_t share_end(const Share& share) { return share.first + share.channels; }

// The states kept at a block's begin: for a tile of w channels [state][w] from channel * states on.
template <class V, class W = typename V::Scalar>
void copy_states(const W* from, int64_t from_step, W* to, int64_t to_step, int64_t states, int64_t channels) {
  with_lanes<V>(channels, [&](auto lanes) {
    for (int64_t n = 0; n < states; ++n) V::load(from + n * from_step, lanes).store(to + n * to_step, lanes);
  });
}

// `start` and `final_state`: (S, D, N). `kept`: (B, slots, D N), or null.
template <class T>
void forward_share(const Inputs<T>& in, const Share& share, const Wide<T>* start, Wide<T>* final_state, Wide<T>* kept,
                   T* y) {
  using V = Vec<T>;
  using W = Wide<T>;
  const Sizes& sizes = in.sizes;
  const int64_t states = sizes.states, tile_states = states * V::N, tiles = (share.channels + V::N - 1) / V::N;
  Scratch scratch;
  W *rates = scratch.get<W>(tiles * tile_states), *h = scratch.get<W>(tiles * tile_states);
  const auto per_token = [&] { return scratch.get<W>(kScanBlock * V::N); };
  Prepared<W> prepared{};
  prepared.x = per_token();
  prepared.step_size = per_token();
  prepared.driven = per_token();
  const auto over_tiles = [&](auto&& body) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t channel = share.first + tile * V::N, left = share_end(share) - channel;
      body(tile * tile_states, channel, left < V::N ? left : V::N);
    }
  };
  const int64_t own = share.sequence * sizes.width * states;
  over_tiles([&](int64_t at, int64_t channel, int64_t channels) {
    to_lanes<V>(in.A + channel * states, channels, states, W(kLog2E), rates + at);
    to_lanes<V>(start + own + channel * states, channels, states, W(1), h + at);
  });
  SelectiveBlock<W> block{};
  block.step_size = prepared.step_size;
  block.driven = prepared.driven;
  block.y = per_token();
  block.group_step = sizes.groups * states;
  for (int64_t t = share.begin; t < share.end; t += block.tokens) {
    block.tokens = block_end(t, share.end) - t;
    block.B = in.B + in.group_offset(share, t);
    block.C = in.C + in.group_offset(share, t);
    over_tiles([&](int64_t at, int64_t channel, int64_t channels) {
      if (kept != nullptr && t % kScanBlock == 0) {
        const int64_t slot = share.row * scan_slots(sizes.length) + t / kScanBlock;
        copy_states<V>(h + at, V::N, kept + (slot * sizes.width + channel) * states, channels, states, channels);
      }
      with_lanes<V>(channels, [&](auto lanes) {
        prepare(in, share.row, t, block.tokens, channel, lanes, prepared);
        for (int64_t i = 0; i < block.tokens; ++i) V(W(0)).store(block.y + i * V::N);
        Wanted wanted(block.y);
        wanted.add(y + (share.row * sizes.length + t) * sizes.width + channel, sizes.width);
        const bool right = channel + V::N < share_end(share);
        const int64_t next_t = right ? t : t + block.tokens, next_channel = right ? channel + V::N : share.first;
        if (next_t < share.end) {
          for (const Track<T>* one : {&in.dt, &in.x, &in.z}) wanted.add(*one, share.row, next_t, next_channel);
        }
        over_states(states, [&](int64_t, int64_t n, auto count) {
          selective_forward_block<decltype(count)::value, V>(block, n, rates + at + n * V::N, h + at + n * V::N,
                                                             wanted.take());
        });
        wanted.rest(block.tokens);
        store_outputs(in, share.row, t, block.tokens, channel, lanes, prepared.x, block.y, y);
      });
    });
  }
  over_tiles([&](int64_t at, int64_t channel, int64_t channels) {
    from_lanes<V>(h + at, channels, states, final_state + own + channel * states);
  });
}

// Where the gradients go. `dB` and `dC`: (parts, B, T, G, N), one slab for each part of a group's channels; `dA`
// (S, D, N), `dD` and `dbias` (S, D): one row for each sequence. `dstate` holds the gradient of the final states.
template <class T> struct Gradients {
  using W = Wide<T>;
  T *dx, *ddt, *dz;
  W *dA, *dB, *dC, *dD, *dbias, *dstate;
};

// The gradients of one block's x, dt and z, and its part of those of D and dt_bias, from the sums over states.
template <class T, class L>
void store_gradients(const Inputs<T>& in, const Share& share, int64_t begin, int64_t channel, L lanes,
                     const Prepared<Wide<T>>& prepared, const SelectiveBlock<Wide<T>>& block, const Gradients<T>& out) {
  using V = Vec<T>;
  using W = Wide<T>;
  const V skip = load_optional<V>(in.D, channel, lanes);
  const int64_t own = share.sequence * in.sizes.width + channel;
  V dD(W(0)), dbias(W(0));
  for (int64_t t = block.tokens - 1; t >= 0; --t) {
    const int64_t to = (share.row * in.sizes.length + begin + t) * in.sizes.width + channel, at = t * V::N;
    const V x = V::load(prepared.x + at), dy = V::load(prepared.dy + at), ddriven = V::load(block.ddriven + at);
    fma(skip, dy, ddriven * V::load(prepared.step_size + at)).store(out.dx + to, lanes);
    const V ds = fma(ddriven, x, V(W(kLn2)) * V::load(block.dlog_decay + at));
    const V ddt = ds * V::load(prepared.slope + at);
    ddt.store(out.ddt + to, lanes);
    dbias = dbias + ddt;
    dD = fma(dy, x, dD);
    if (in.z) (V::load(prepared.dz + at) * fma(skip, x, V::load(block.y + at))).store(out.dz + to, lanes);
  }
  (dD + V::load(out.dD + own, lanes)).store(out.dD + own, lanes);
  (dbias + V::load(out.dbias + own, lanes)).store(out.dbias + own, lanes);
}

template <class T>
void backward_share(const Inputs<T>& in, const Track<T>& dy_track, const Share& share, const Wide<T>* start,
                    const Wide<T>* kept, const Gradients<T>& out) {
  using V = Vec<T>;
  using W = Wide<T>;
  const Sizes& sizes = in.sizes;
  const int64_t states = sizes.states, tile_states = states * V::N, tiles = (share.channels + V::N - 1) / V::N;
  const int64_t own = share.sequence * sizes.width * states;
  Scratch scratch;
  W *rates = scratch.get<W>(tiles * tile_states), *pull = scratch.get<W>(tiles * tile_states);
  W *drates = scratch.get<W>(tiles * tile_states), *h = scratch.get<W>(tile_states);
  const auto per_token = [&] { return scratch.get<W>(kScanBlock * V::N); };
  const Prepared<W> prepared{per_token(), per_token(), per_token(), per_token(), per_token(), per_token()};
  SelectiveBlock<W> block{};
  block.step_size = prepared.step_size;
  block.driven = prepared.driven;
  block.dy = prepared.dy;
  block.y = per_token();
  block.ddriven = per_token();
  block.dlog_decay = per_token();
  block.h = scratch.get<W>(kScanBlock * 4 * V::N);
  block.a = scratch.get<W>(kScanBlock * 4 * V::N);
  block.sum_step = num_passes(states) * kSumsOfPass<V>;
  block.dB = scratch.get<W>(kScanBlock * block.sum_step);
  block.dC = scratch.get<W>(kScanBlock * block.sum_step);
  block.group_step = sizes.groups * states;
  const auto over_tiles = [&](auto&& body) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t channel = share.first + tile * V::N, left = share_end(share) - channel;
      body(tile * tile_states, channel, left < V::N ? left : V::N);
    }
  };
  over_tiles([&](int64_t at, int64_t channel, int64_t channels) {
    to_lanes<V>(in.A + channel * states, channels, states, W(kLog2E), rates + at);
    to_lanes<V>(out.dstate + own + channel * states, channels, states, W(1), pull + at);
  });
  for (int64_t i = 0; i < tiles * tile_states; ++i) drates[i] = 0;

  for (int64_t end = share.end; end > share.begin; end -= block.tokens) {
    const int64_t t = block_begin(end, share.begin), offset = in.group_offset(share, t);
    block.tokens = end - t;
    block.B = in.B + offset;
    block.C = in.C + offset;
    block.first = true;
    over_tiles([&](int64_t at, int64_t channel, int64_t channels) {
      if (t % kScanBlock == 0) {
        const int64_t slot = share.row * scan_slots(sizes.length) + t / kScanBlock;
        for (int64_t i = 0; channels < V::N && i < tile_states; ++i) h[i] = 0;
        copy_states<V>(kept + (slot * sizes.width + channel) * states, channels, h, V::N, states, channels);
      } else {
        to_lanes<V>(start + own + channel * states, channels, states, W(1), h);
      }
      with_lanes<V>(channels, [&](auto lanes) {
        prepare_backward(in, dy_track, share.row, t, block.tokens, channel, lanes, prepared);
        for (W* sum : {block.y, block.ddriven, block.dlog_decay}) {
          for (int64_t i = 0; i < block.tokens; ++i) V(W(0)).store(sum + i * V::N);
        }
        Wanted wanted(block.y);
        const int64_t to = (share.row * sizes.length + t) * sizes.width + channel;
        for (T* one : {out.dx, out.ddt}) wanted.add(one + to, sizes.width);
        if (in.z) wanted.add(out.dz + to, sizes.width);
        const bool right = channel + V::N < share_end(share);
        if (right || t > share.begin) {
          const int64_t next_t = right ? t : block_begin(t, share.begin);
          for (const Track<T>* one : {&in.dt, &in.x, &dy_track, &in.z}) {
            wanted.add(*one, share.row, next_t, right ? channel + V::N : share.first);
          }
        }
        over_states(states, [&](int64_t pass, int64_t n, auto count) {
          const Ahead first_ahead = wanted.take(), second_ahead = wanted.take();
          selective_backward_block<decltype(count)::value, V>(block, pass, n, rates + at + n * V::N, h + n * V::N,
                                                              pull + at + n * V::N, drates + at + n * V::N,
                                                              first_ahead, second_ahead);
        });
        wanted.rest(block.tokens);
        store_gradients(in, share, t, channel, lanes, prepared, block, out);
      });
      block.first = false;
    });
    const int64_t slab = share.part * sizes.batch * sizes.length * sizes.groups * states;
    const auto add_up = [&](const W* from, W* to) {
      for (int64_t i = 0; i < block.tokens; ++i) {
        over_states(states, [&](int64_t pass, int64_t n, auto count) {
          add_sums<V>(from + i * block.sum_step + pass * kSumsOfPass<V>, decltype(count)::value,
                      to + slab + offset + i * block.group_step + n);
        });
      }
    };
    add_up(block.dB, out.dB);
    add_up(block.dC, out.dC);
  }
  over_tiles([&](int64_t at, int64_t channel, int64_t channels) {
    from_lanes<V>(drates + at, channels, states, out.dA + own + channel * states);
    from_lanes<V>(pull + at, channels, states, out.dstate + own + channel * states);
  });
}

int64_t operations(const Sizes& sizes) { return sizes.batch * sizes.length * sizes.width * (sizes.states + 4); }

// Returns y, the final states (S, D, N) and the kept states, flat, (B, slots, D N): no slots unless `keep`.
std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                                  const OptionalTensor& dt_bias, bool dt_softplus,
                                                  const OptionalTensor& initial_state,
                                                  const OptionalTensor& cu_seqlens, bool keep) {
  const Sizes sizes(x, A, B);
  const Arguments arguments(x, dt, A, B, C, D, z, dt_bias, dt_softplus);
  const Sequences sequences(x, cu_seqlens);
  Tensor y = empty_like(arguments.x);
  Tensor final_state, kept;
  dispatch_dtype(arguments.x.dtype(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Inputs<T> inputs(arguments, sizes);
    const Tensor start = starting_states<W>(initial_state, {sequences.count(), sizes.width, sizes.states});
    final_state = empty({sequences.count(), sizes.width, sizes.states}, dtype_of<W>());
    const int64_t slots = keep ? scan_slots(sizes.length) : 0;
    kept = empty({sizes.batch * slots * sizes.width * sizes.states}, dtype_of<W>());
    const W* start_data = start.data<W>();
    W* final_data = final_state.mutable_data<W>();
    W* kept_data = keep ? kept.mutable_data<W>() : nullptr;
    T* y_data = y.mutable_data<T>();
    scan_tasks(sequences.count() * sizes.groups * sizes.parts, operations(sizes), [&](int64_t task) {
      forward_share(inputs, Share(task, sizes, sequences), start_data, final_data, kept_data, y_data);
    });
  });
  if (y.dtype() != x.dtype()) y = cast(y, x.dtype());
  return {std::move(y), std::move(final_state), std::move(kept)};
}

// Sums of the slabs of dB or dC, as (B, T, G, N).
template <class W> Tensor add_slabs(Tensor& slabs, const Tensor& like) {
  Tensor sum = empty(like.dim(), like.sizes(), dtype_of<W>());
  if (slabs.size(0) == 0) sum = zeros({like.size(0), like.size(1), like.size(2), like.size(3)}, dtype_of<W>());
  if (slabs.size(0) > 0) {
    add_chunks<Vec<W>>(slabs.data<W>(), slabs.size(0), sum.numel(), sum.mutable_data<W>());
  }
  return cast(sum, like.dtype());
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; empty tensors for those that were not given.
NineTensors selective_scan_backward(const OptionalTensor& dy_any, const OptionalTensor& dfinal_state, const Tensor& x,
                                    const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                                    bool dt_softplus, const OptionalTensor& initial_state,
                                    const OptionalTensor& cu_seqlens, const Tensor& kept_any) {
  const Sizes sizes(x, A, B);
  const Arguments arguments(x, dt, A, B, C, D, z, dt_bias, dt_softplus);
  const Sequences sequences(x, cu_seqlens);
  require(!dy_any || (dy_any.same_shape(x) && dy_any.dtype() == x.dtype()),
          "selective_scan: dy must have the shape and dtype of x");
  Tensor kept = contiguous(kept_any);
  if (kept.numel() == 0) {
    // The forward ran without knowing that it would be differentiated (under torch.func).
    OptionalTensor none;
    kept = std::get<2>(selective_scan(x, dt, A, B, C, D, none, dt_bias, dt_softplus, initial_state, cu_seqlens, true));
  }
  require(kept.numel() == sizes.batch * scan_slots(sizes.length) * sizes.width * sizes.states,
          "selective_scan: kept must hold (B, slots, D, N)");
  const int64_t count = sequences.count();
  NineTensors result;
  dispatch_dtype(arguments.x.dtype(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    constexpr DType kWide = dtype_of<W>();
    const Inputs<T> inputs(arguments, sizes);
    Tensor dy;
    if (dy_any) dy = dy_any.dtype() == dtype_of<T>() ? last_contiguous(dy_any) : cast(dy_any, dtype_of<T>());
    const Track<T> dy_track(dy);
    const Tensor start = starting_states<W>(initial_state, {count, sizes.width, sizes.states});
    const Tensor dfinal = starting_states<W>(dfinal_state, {count, sizes.width, sizes.states});
    Tensor dx = empty_like(arguments.x), ddt = empty_like(arguments.x), dz = empty({0}, dtype_of<T>());
    if (z) dz = empty_like(arguments.x);
    Tensor dA = empty({count, sizes.width, sizes.states}, kWide), dstate = empty_like(dA);
    Tensor dB = empty({sizes.parts, sizes.batch, sizes.length, sizes.groups, sizes.states}, kWide);
    Tensor dC = empty_like(dB);
    Tensor dD = zeros({count, sizes.width}, kWide), dbias = zeros({count, sizes.width}, kWide);
    const int64_t state_elements = dstate.numel();
    if (state_elements > 0) std::memcpy(dstate.mutable_raw(), dfinal.raw(), state_elements * sizeof(W));
    const Gradients<T> out{dx.mutable_data<T>(), ddt.mutable_data<T>(), dz.mutable_data<T>(),
                           dA.mutable_data<W>(), dB.mutable_data<W>(),  dC.mutable_data<W>(),
                           dD.mutable_data<W>(), dbias.mutable_data<W>(), dstate.mutable_data<W>()};
    const W *start_data = start.data<W>(), *kept_data = kept.data<W>();
    scan_tasks(count * sizes.groups * sizes.parts, 3 * operations(sizes), [&](int64_t task) {
      backward_share(inputs, dy_track, Share(task, sizes, sequences), start_data, kept_data, out);
    });
    const auto or_nothing = [&](Tensor& partial, const OptionalTensor& parameter) {
      return parameter ? add_sequences<W>(partial, {sizes.width}, parameter.dtype()) : empty({0}, kWide);
    };
    result = {cast(dx, x.dtype()),
              cast(ddt, dt.dtype()),
              add_sequences<W>(dA, {sizes.width, sizes.states}, A.dtype()),
              add_slabs<W>(dB, B),
              add_slabs<W>(dC, C),
              or_nothing(dD, D),
              z ? cast(dz, z.dtype()) : std::move(dz),
              or_nothing(dbias, dt_bias),
              initial_state ? cast(dstate, initial_state.dtype()) : empty({0}, kWide)};
  });
  return result;
}

STAR_OPERATOR(
    "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
    " bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor)",
    selective_scan);
STAR_OPERATOR(
    "selective_scan_backward(Tensor? dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,"
    " Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, Tensor kept)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    selective_scan_backward);

}  // namespace
}  // namespace star
