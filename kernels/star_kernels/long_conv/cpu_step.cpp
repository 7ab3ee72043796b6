// One token of the long convolution, whose state is the history of gated inputs, and the gradient of that step.
#include "lanes.h"

namespace star {
namespace {

using namespace long_convolution;

void check(const Tensor& state, const Tensor& x, const Tensor& filter, const OptionalTensor& gate_in,
           const OptionalTensor& gate_out, const OptionalTensor& skip) {
  require(x.dim() == 2, "long_conv_step: x must be (B, D)");
  require(filter.dim() == 2 && filter.size(0) == x.size(1) && filter.size(1) >= 1,
          "long_conv_step: filter must be (D, L) with L >= 1");
  require(state.dim() == 3 && state.size(0) == x.size(0) && state.size(2) == x.size(1) &&
              state.size(1) < filter.size(1),
          "long_conv_step: state must be (B, P, D) with P <= L - 1");
  for (const OptionalTensor* gate : {&gate_in, &gate_out}) {
    require(!*gate || (gate->same_shape(x) && gate->dtype() == x.dtype()),
            "long_conv_step: gates must have the shape and dtype of x");
  }
  require(!skip || (skip.dim() == 1 && skip.size(0) == x.size(1)), "long_conv_step: skip must be (D,)");
}

template <class T> const T* row_of(const Tensor& tensor, int64_t b, int64_t channel) {
  return tensor.defined() ? tensor.data<T>() + b * tensor.stride(0) + channel : nullptr;
}

// Four columns of N taps each are held at a time: history token t meets tap P - t.
template <class V> constexpr int64_t kTile = 4 * V::N;

// The sum of history[t] tap[P - t] for t < P, for a block of channels; token t is copied to token t - shift of `kept`.
template <class V, class L>
V convolve_history(const typename V::Scalar* history, int64_t token, int64_t held, const typename V::Scalar* taps,
                   int64_t taps_row, int64_t channels, L lanes, typename V::Scalar* kept, int64_t kept_token,
                   int64_t shift) {
  alignas(64) typename V::Scalar column[kTile<V> * V::N];
  V sums[4] = {V(0), V(0), V(0), V(0)};
  for (int64_t begin = 0; begin < held; begin += kTile<V>) {
    const int64_t count = held - begin < kTile<V> ? held - begin : kTile<V>;
    // Taps held - begin - count + 1 .. held - begin, of which history token t takes number held - t.
    stage_taps<V>(taps + held - begin - count + 1, taps_row, count, count, channels, column);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = begin + i;
      const V value = V::load(history + t * token, lanes);
      if (t >= shift) value.store(kept + (t - shift) * kept_token, lanes);
      sums[i % 4] = fma(value, V::load(column + (count - 1 - i) * V::N), sums[i % 4]);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

Tensor optional_rows(const OptionalTensor& tensor) { return tensor ? last_contiguous(tensor) : Tensor(); }

// body(row, first channel, channels) for every row and block of channels.
template <class V, class F> void over_blocks(int64_t rows, int64_t width, int64_t cost, F&& body) {
  const int64_t blocks = (width + V::N - 1) / V::N;
  parallel_for(rows * blocks, grain_rows(cost * V::N), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * V::N;
      body(task / blocks, first, width - first < V::N ? width - first : int64_t{V::N});
    }
  });
}

std::tuple<Tensor, Tensor> long_conv_step(const Tensor& state_any, const Tensor& x_any, const Tensor& filter_any,
                                          const OptionalTensor& gate_in_any, const OptionalTensor& gate_out_any,
                                          const OptionalTensor& skip_any) {
  check(state_any, x_any, filter_any, gate_in_any, gate_out_any, skip_any);
  const Tensor x = last_contiguous(x_any), gate_in = optional_rows(gate_in_any), gate_out = optional_rows(gate_out_any);
  Tensor y = empty_like(x), new_state;
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    using S = Wide<T>;
    constexpr DType kWide = dtype_of<S>();
    const Tensor filter = cast(filter_any, kWide), state = cast(state_any, kWide);
    const Tensor skip = skip_any ? cast(skip_any, kWide) : Tensor();
    const int64_t rows = x.size(0), width = x.size(1), held = state.size(1), taps = filter.size(1);
    const int64_t kept = held + 1 < taps ? held + 1 : taps - 1, shift = held + 1 - kept;
    new_state = empty({rows, kept, width}, kWide);
    const S *state_data = state.data<S>(), *filter_data = filter.data<S>();
    S* kept_data = new_state.mutable_data<S>();
    T* y_data = y.mutable_data<T>();
    over_blocks<V>(rows, width, held + 1, [&](int64_t b, int64_t first, int64_t channels) {
      with_lanes<V>(channels, [&](auto lanes) {
        S* own_kept = kept_data + b * kept * width + first;
        const S* own_taps = filter_data + first * taps;
        V sum = convolve_history<V>(state_data + b * held * width + first, width, held, own_taps, taps, channels, lanes,
                                    own_kept, width, shift);
        V u = V::load(row_of<T>(x, b, first), lanes);
        if (gate_in.defined()) u = u * V::load(row_of<T>(gate_in, b, first), lanes);
        if (held >= shift) u.store(own_kept + (held - shift) * width, lanes);
        alignas(64) S present[V::N];
        stage_taps<V>(own_taps, taps, 1, 1, channels, present);
        sum = fma(u, V::load(present), sum);
        if (skip.defined()) sum = fma(V::load(skip.data<S>() + first, lanes), u, sum);
        if (gate_out.defined()) sum = sum * V::load(row_of<T>(gate_out, b, first), lanes);
        sum.store(y_data + b * width + first, lanes);
      });
    });
  });
  return {std::move(y), std::move(new_state)};
}

// The gradients of one block of channels, over all rows in order: the sums over rows are this block's alone.
template <class T> struct StepBackward {
  using V = Vec<T>;
  using S = Wide<T>;
  Tensor dy, dnew_state, state, x, filter, gate_in, gate_out, skip;
  Tensor dstate, dx, dtaps, dgate_in, dgate_out, dskip;

  void run(int64_t first, int64_t channels) {
    const int64_t rows = x.size(0), width = x.size(1), held = state.size(1), taps = filter.size(1);
    const int64_t kept = dnew_state.size(1), shift = held + 1 - kept;
    Scratch scratch;
    S *column = scratch.get<S>((held + 1) * V::N), *dcolumn = scratch.get<S>((held + 1) * V::N);
    stage_taps<V>(filter.data<S>() + first * taps, taps, held + 1, held + 1, channels, column);
    for (int64_t i = 0; i < (held + 1) * V::N; ++i) dcolumn[i] = 0;
    V dskip_sum(0);
    with_lanes<V>(channels, [&](auto lanes) {
      const V skip_row = skip.defined() ? V::load(skip.data<S>() + first, lanes) : V(0);
      for (int64_t b = 0; b < rows; ++b) {
        const S *history = state.data<S>() + b * held * width + first,
                *dkept = dnew_state.data<S>() + b * kept * width + first;
        S* dhistory = dstate.mutable_data<S>() + b * held * width + first;
        const V x_row = V::load(row_of<T>(x, b, first), lanes), dy_row = V::load(row_of<T>(dy, b, first), lanes);
        const V gate_row = gate_in.defined() ? V::load(row_of<T>(gate_in, b, first), lanes) : V(1);
        const V u = x_row * gate_row;
        V dv = dy_row;
        if (gate_out.defined()) dv = dv * V::load(row_of<T>(gate_out, b, first), lanes);
        V sum(0);
        for (int64_t t = 0; t < held; ++t) {
          S *dtap = dcolumn + (held - t) * V::N;
          const V value = V::load(history + t * width, lanes), tap = V::load(column + (held - t) * V::N);
          sum = fma(value, tap, sum);
          fma(dv, value, V::load(dtap)).store(dtap);
          V dvalue = dv * tap;
          if (t >= shift) dvalue = dvalue + V::load(dkept + (t - shift) * width, lanes);
          dvalue.store(dhistory + t * width, lanes);
        }
        fma(dv, u, V::load(dcolumn)).store(dcolumn);
        sum = fma(u, V::load(column) + skip_row, sum);
        V du = dv * (V::load(column) + skip_row);
        if (held >= shift) du = du + V::load(dkept + (held - shift) * width, lanes);
        dskip_sum = fma(dv, u, dskip_sum);
        if (gate_out.defined()) (dy_row * sum).store(dgate_out.mutable_data<T>() + b * width + first, lanes);
        if (gate_in.defined()) (du * x_row).store(dgate_in.mutable_data<T>() + b * width + first, lanes);
        (du * gate_row).store(dx.mutable_data<T>() + b * width + first, lanes);
      }
      if (skip.defined()) dskip_sum.store(dskip.mutable_data<S>() + first, lanes);
    });
    S* out = dtaps.mutable_data<S>() + first * taps;
    unstage_taps<V>(dcolumn, held + 1, channels, out, taps);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t j = held + 1; j < taps; ++j) out[c * taps + j] = 0;
    }
  }
};

// dstate, dx, dfilter, dgate_in, dgate_out, dskip; what belongs to an absent argument has no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> long_conv_step_backward(
    const Tensor& dy, const Tensor& dnew_state, const Tensor& state, const Tensor& x, const Tensor& filter,
    const OptionalTensor& gate_in, const OptionalTensor& gate_out, const OptionalTensor& skip) {
  check(state, x, filter, gate_in, gate_out, skip);
  require(dy.same_shape(x) && dy.dtype() == x.dtype(), "long_conv_step: dy must have the shape and dtype of x");
  const int64_t held = state.size(1), taps = filter.size(1);
  require(dnew_state.dim() == 3 && dnew_state.size(0) == x.size(0) && dnew_state.size(2) == x.size(1) &&
              dnew_state.size(1) == (held + 1 < taps ? held + 1 : taps - 1),
          "long_conv_step: dnew_state must have the new state's shape");
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> result;
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    constexpr DType kWide = dtype_of<Wide<T>>();
    const auto like = [&](bool present) { return present ? empty_like(x) : empty({0}, x.dtype()); };
    StepBackward<T> backward{last_contiguous(dy),
                             cast(dnew_state, kWide),
                             cast(state, kWide),
                             last_contiguous(x),
                             cast(filter, kWide),
                             optional_rows(gate_in),
                             optional_rows(gate_out),
                             skip ? cast(skip, kWide) : Tensor(),
                             empty({x.size(0), held, x.size(1)}, kWide),
                             empty_like(x),
                             empty({x.size(1), taps}, kWide),
                             like(bool(gate_in)),
                             like(bool(gate_out)),
                             empty({skip ? x.size(1) : 0}, kWide)};
    over_blocks<V>(1, x.size(1), x.size(0) * (held + 1),
                   [&](int64_t, int64_t first, int64_t channels) { backward.run(first, channels); });
    result = {cast(backward.dstate, state.dtype()),
              std::move(backward.dx),
              cast(backward.dtaps, filter.dtype()),
              std::move(backward.dgate_in),
              std::move(backward.dgate_out),
              skip ? cast(backward.dskip, skip.dtype()) : std::move(backward.dskip)};
  });
  return result;
}

STAR_OPERATOR(
    "long_conv_step(Tensor state, Tensor x, Tensor filter, Tensor? gate_in, Tensor? gate_out, Tensor? skip) "
    "-> (Tensor, Tensor)",
    long_conv_step);
STAR_OPERATOR(
    "long_conv_step_backward(Tensor dy, Tensor dnew_state, Tensor state, Tensor x, Tensor filter, Tensor? gate_in, "
    "Tensor? gate_out, Tensor? skip) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    long_conv_step_backward);

}  // namespace
}  // namespace star
