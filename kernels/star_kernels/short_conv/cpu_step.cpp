// One token of the short convolutions. Weights and states are read channel by channel, as they lie; the activation and
// the outer gate follow a vector at a time, by the same code as for many tokens.
#include "short_conv/conv.h"

namespace star {
namespace {

constexpr int64_t kStepChannels = 256;  // whose convolutions wait for their activation in the first-level cache

// z = bias + conv, and the state moved on by one token, for `channels` channels. kTaps = 0: any number.
template <int kTaps, class W>
void step_channels(const W* u, const W* weight, const W* bias, const W* state, int64_t num_taps, int64_t channels,
                   W* z, W* new_state) {
  using S = VecS<W>;
  const int64_t taps = kTaps > 0 ? kTaps : num_taps, history = taps - 1;
  for (int64_t c = 0; c < channels; ++c) {
    const W *own = state + c * history, *filter = weight + c * taps;
    S sum(bias == nullptr ? 0 : bias[c]);
    for (int64_t w = 0; w < history; ++w) {
      sum = fma(S(filter[w]), S(own[w]), sum);
      if (w > 0) new_state[c * history + w - 1] = own[w];
    }
    if (history > 0) new_state[c * history + history - 1] = u[c];
    z[c] = fma(S(filter[history]), S(u[c]), sum).v;
  }
}

template <class W> auto step_channels_for(int64_t taps) {
  switch (taps) {
    case 2: return &step_channels<2, W>;
    case 3: return &step_channels<3, W>;
    case 4: return &step_channels<4, W>;
    default: return &step_channels<0, W>;
  }
}

template <class T, Kind kind>
void step_rows(const Tensor& state, const Streams& in, const Tensor& weight, const Tensor& bias, Tensor& y,
               Tensor& new_state) {
  using V = Vec<T>;
  using W = Wide<T>;
  const int64_t batch = in.x.size(0), channels = in.x.size(1), taps = weight.size(1), history = taps - 1;
  const auto run = step_channels_for<W>(taps);
  const T* x = in.x.data<T>();
  const T *gate_in = in.gate_in ? in.gate_in.data<T>() : nullptr;
  const T *gate_out = in.gate_out ? in.gate_out.data<T>() : nullptr;
  const W *filter = weight.data<W>(), *offset = bias ? bias.data<W>() : nullptr, *old = state.data<W>();
  T* out = y.mutable_data<T>();
  W* next = new_state.mutable_data<W>();
  const int64_t blocks = (channels + kStepChannels - 1) / kStepChannels;
  parallel_for(batch * blocks, grain_rows(kStepChannels * taps), [=, &in](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, channel = task % blocks * kStepChannels;
      const int64_t width = channels - channel < kStepChannels ? channels - channel : kStepChannels;
      W u[kStepChannels], z[kStepChannels];
      const T* x_row = x + b * in.x.stride(0) + channel;
      sweep<V>(width, [&](int64_t i, auto lanes) {
        V value = V::load(x_row + i, lanes);
        if constexpr (kind == Kind::kGated) {
          value = value * V::load(gate_in + b * in.gate_in.stride(0) + channel + i, lanes);
        }
        value.store(u + i, lanes);
      });
      const int64_t state_offset = (b * channels + channel) * history;
      run(u, filter + channel * taps, offset == nullptr ? nullptr : offset + channel, old + state_offset, taps, width,
          z, next + state_offset);
      T* y_row = out + b * channels + channel;
      sweep<V>(width, [&](int64_t i, auto lanes) {
        V sum = V::load(z + i, lanes);
        if constexpr (kind == Kind::kSilu) sum = silu(sum);
        if constexpr (kind == Kind::kGated) {
          sum = sum * V::load(gate_out + b * in.gate_out.stride(0) + channel + i, lanes);
        }
        sum.store(y_row + i, lanes);
      });
    }
  });
}

std::tuple<Tensor, Tensor> step(Kind kind, const Tensor& state_any, const Streams& in, const Tensor& weight_any,
                                const OptionalTensor& bias_any) {
  check_filter(in.x, weight_any, bias_any, OptionalTensor(), 0);
  require(state_any.dim() == 3 && state_any.size(0) == in.x.size(0) && state_any.size(1) == in.x.size(1) &&
              state_any.size(2) == weight_any.size(1) - 1,
          "short convolution step: state must be (B, D, W - 1)");
  Tensor y = empty_like(in.x);
  Tensor new_state;
  dispatch_dtype(in.x.dtype(), [&](auto element) {
    using T = decltype(element);
    constexpr DType kWide = dtype_of<Wide<T>>();
    const Tensor state = cast(state_any, kWide), weight = cast(weight_any, kWide);
    const Tensor bias = bias_any ? cast(bias_any, kWide) : Tensor();
    new_state = empty_like(state);
    switch (kind) {
      case Kind::kPlain: return step_rows<T, Kind::kPlain>(state, in, weight, bias, y, new_state);
      case Kind::kSilu: return step_rows<T, Kind::kSilu>(state, in, weight, bias, y, new_state);
      case Kind::kGated: return step_rows<T, Kind::kGated>(state, in, weight, bias, y, new_state);
    }
  });
  return {std::move(y), std::move(new_state)};
}

std::tuple<Tensor, Tensor> causal_conv1d_step(const Tensor& state, const Tensor& x, const Tensor& weight,
                                              const OptionalTensor& bias, bool silu) {
  require(x.dim() == 2, "causal_conv1d_step: x must be (B, D)");
  return step(silu ? Kind::kSilu : Kind::kPlain, state, {last_contiguous(x), Tensor(), Tensor()}, weight, bias);
}

std::tuple<Tensor, Tensor> gated_short_conv_step(const Tensor& state, const Tensor& x, const Tensor& gate_in,
                                                 const Tensor& gate_out, const Tensor& weight,
                                                 const OptionalTensor& bias) {
  require(x.dim() == 2, "gated_short_conv_step: x must be (B, D)");
  check_gates(x, gate_in, gate_out);
  return step(Kind::kGated, state, {last_contiguous(x), last_contiguous(gate_in), last_contiguous(gate_out)}, weight,
              bias);
}

STAR_OPERATOR("causal_conv1d_step(Tensor state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> (Tensor, Tensor)",
              causal_conv1d_step);
STAR_OPERATOR("gated_short_conv_step(Tensor state, Tensor x, Tensor gate_in, Tensor gate_out, Tensor weight, "
              "Tensor? bias) -> (Tensor, Tensor)",
              gated_short_conv_step);

}  // namespace
}  // namespace star
