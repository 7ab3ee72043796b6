// Long causal convolutions: y = gate_out * (skip * u + filter conv u) with u = gate_in * x, in blocks of V::N channels,
// one block and group of sequences a task. Short filters go token by token, long ones through a Fourier transform.
//
// All three products of the backward are causal convolutions too, once dy runs backwards in time (marked '):
//   du' = filter conv dv',   dfilter'_j = (dv' conv u)_j,   v = filter conv u, computed again for gate_out's gradient.
#include "blocks.h"

namespace star {
namespace {

using namespace long_convolution;

Tensor optional_rows(const OptionalTensor& tensor) { return tensor ? last_contiguous(tensor) : Tensor(); }

void check(const Tensor& x, const Tensor& filter, const OptionalTensor& gate_in, const OptionalTensor& gate_out,
           const OptionalTensor& skip) {
  require(x.dim() == 3, "long_conv: x must be (B, T, D)");
  require(filter.dim() == 2 && filter.size(0) == x.size(2) && filter.size(1) >= 1,
          "long_conv: filter must be (D, L) with L >= 1");
  for (const OptionalTensor* gate : {&gate_in, &gate_out}) {
    require(!*gate || (gate->same_shape(x) && gate->dtype() == x.dtype()),
            "long_conv: gates must have the shape and dtype of x");
  }
  require(!skip || (skip.dim() == 1 && skip.size(0) == x.size(2)), "long_conv: skip must be (D,)");
}

template <class V> V load_channels(const typename V::Scalar* values, int64_t first, int64_t channels) {
  V result(0);
  if (values != nullptr) {
    with_lanes<V>(channels, [&](auto lanes) { result = V::load(values + first, lanes); });
  }
  return result;
}

template <class T> struct Forward {
  using V = Vec<T>;
  using S = Wide<T>;
  Rows3<const T> x, gate_in, gate_out;
  Rows3<T> y;
  const S *taps, *skip;
  int64_t taps_per_channel, width, longest;

  void run(const Sequences& sequences, int64_t begin, int64_t end, int64_t first) const {
    const int64_t channels = width - first < V::N ? width - first : V::N;
    BlockFilter<V> filter(taps + first * taps_per_channel, taps_per_channel, channels, longest);
    S *u = filter.new_column(), *out = filter.new_column(), *spectrum = filter.new_spectrum();
    const V skip_row = load_channels<V>(skip, first, channels);
    for (int64_t i = begin; i < end; ++i) {
      const Sequence at = sequences[i];
      if (at.length == 0) continue;
      filter.fit(at.length);
      const auto poison = stage<T, V>(x.from(at.batch, at.begin, first), gate_in.from(at.batch, at.begin, first),
                                      at.length, filter.padded(), channels, false, u);
      if (filter.fourier()) {
        const Transform<V>& transform = filter.transform();
        transform.begin_forward(u, spectrum);
        for (int64_t part = 0; part < transform.parts(); ++part) {
          transform.forward_part(spectrum, part);
          filter.multiply_part(spectrum, part);
        }
      }
      filter.finish(u, poison, spectrum, out);
      finish(at, first, channels, skip_row, u, out);
    }
  }

  void finish(const Sequence& at, int64_t first, int64_t channels, V skip_row, const S* u, const S* out) const {
    const Rows3<const T> gate = gate_out.from(at.batch, at.begin, first);
    const Rows3<T> result = y.from(at.batch, at.begin, first);
    with_lanes<V>(channels, [&](auto lanes) {
      for (int64_t t = 0; t < at.length; ++t) {
        result.expect(t, at.length);
        V value = V::load(out + t * V::N);
        if (skip != nullptr) value = fma(skip_row, V::load(u + t * V::N), value);
        if (gate.data != nullptr) gate.expect(t, at.length), value = value * V::load(gate.at(t), lanes);
        value.store(result.at(t), lanes);
      }
    });
  }
};

template <class T> struct Backward {
  using V = Vec<T>;
  using S = Wide<T>;
  Rows3<const T> dy, x, gate_in, gate_out;
  Rows3<T> dx, dgate_in, dgate_out;
  const S *taps, *skip;
  int64_t taps_per_channel, width, longest;

  // dtaps: a column of `reach` taps; dskip: V::N numbers.
  void run(const Sequences& sequences, int64_t begin, int64_t end, int64_t first, int64_t reach, S* dtaps,
           S* dskip) const {
    const int64_t channels = width - first < V::N ? width - first : V::N;
    BlockFilter<V> filter(taps + first * taps_per_channel, taps_per_channel, channels, longest);
    BlockFilterGradient<V> gradient(filter, dtaps, reach);
    S *u = filter.new_column(), *dv = filter.new_column(), *out = filter.new_column();
    S *u_spectrum = filter.new_spectrum(), *dv_spectrum = filter.new_spectrum();
    const V skip_row = load_channels<V>(skip, first, channels);
    V dskip_sum(0);
    for (int64_t i = begin; i < end; ++i) {
      const Sequence at = sequences[i];
      if (at.length == 0) continue;
      if (at.length != filter.length()) {
        gradient.flush();
        filter.fit(at.length);
      }
      const auto u_poison = stage<T, V>(x.from(at.batch, at.begin, first), gate_in.from(at.batch, at.begin, first),
                                        at.length, filter.padded(), channels, false, u);
      const auto dv_poison = stage<T, V>(dy.from(at.batch, at.begin, first), gate_out.from(at.batch, at.begin, first),
                                         at.length, filter.padded(), channels, true, dv);
      if (filter.fourier()) {
        const Transform<V>& transform = filter.transform();
        transform.begin_forward(u, u_spectrum);
        transform.begin_forward(dv, dv_spectrum);
        for (int64_t part = 0; part < transform.parts(); ++part) {
          transform.forward_part(u_spectrum, part);
          transform.forward_part(dv_spectrum, part);
          gradient.see_part(u_spectrum, u_poison, dv_spectrum, dv_poison, part);
          if (gate_out.data != nullptr) filter.multiply_part(u_spectrum, part);
          filter.multiply_part(dv_spectrum, part);
        }
      }
      gradient.see(u, u_poison, dv, dv_poison);
      if (gate_out.data != nullptr) {
        filter.finish(u, u_poison, u_spectrum, out);
        finish_gate_out(at, first, channels, skip_row, u, out);
      }
      filter.finish(dv, dv_poison, dv_spectrum, out);
      dskip_sum = dskip_sum + finish_input(at, first, channels, skip_row, u, dv, out);
    }
    gradient.flush();
    dskip_sum.store(dskip);
  }

  void finish_gate_out(const Sequence& at, int64_t first, int64_t channels, V skip_row, const S* u,
                       const S* out) const {
    const Rows3<const T> upstream = dy.from(at.batch, at.begin, first);
    const Rows3<T> result = dgate_out.from(at.batch, at.begin, first);
    with_lanes<V>(channels, [&](auto lanes) {
      for (int64_t t = 0; t < at.length; ++t) {
        upstream.expect(t, at.length);
        result.expect(t, at.length);
        V value = V::load(out + t * V::N);
        if (skip != nullptr) value = fma(skip_row, V::load(u + t * V::N), value);
        (value * V::load(upstream.at(t), lanes)).store(result.at(t), lanes);
      }
    });
  }

  // `dv` and `out` run backwards in time. Returns this sequence's part of dskip.
  V finish_input(const Sequence& at, int64_t first, int64_t channels, V skip_row, const S* u, const S* dv,
                 const S* out) const {
    constexpr int64_t kRun = 64;  // summed apart, so that the error grows with the root of a few hundred at most
    const Rows3<const T> input = x.from(at.batch, at.begin, first), gate = gate_in.from(at.batch, at.begin, first);
    const Rows3<T> result = dx.from(at.batch, at.begin, first), gate_result = dgate_in.from(at.batch, at.begin, first);
    V total(0);
    with_lanes<V>(channels, [&](auto lanes) {
      for (int64_t begin = 0; begin < at.length; begin += kRun) {
        const int64_t end = at.length - begin < kRun ? at.length : begin + kRun;
        V sum(0);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t back = (at.length - 1 - t) * V::N;
          V du = V::load(out + back);
          if (skip != nullptr) {
            const V dv_t = V::load(dv + back);
            du = fma(skip_row, dv_t, du);
            sum = fma(dv_t, V::load(u + t * V::N), sum);
          }
          result.expect(t, at.length);
          if (gate.data != nullptr) {
            input.expect(t, at.length);
            gate.expect(t, at.length);
            gate_result.expect(t, at.length);
            (du * V::load(input.at(t), lanes)).store(gate_result.at(t), lanes);
            du = du * V::load(gate.at(t), lanes);
          }
          du.store(result.at(t), lanes);
        }
        total = total + sum;
      }
    });
    return total;
  }
};

Tensor long_conv(const Tensor& x_any, const Tensor& filter_any, const OptionalTensor& gate_in_any,
                 const OptionalTensor& gate_out_any, const OptionalTensor& skip_any, const OptionalTensor& cu_seqlens) {
  check(x_any, filter_any, gate_in_any, gate_out_any, skip_any);
  const Tensor x = last_contiguous(x_any), gate_in = optional_rows(gate_in_any), gate_out = optional_rows(gate_out_any);
  Tensor y = empty_like(x);
  if (x.numel() == 0) return y;
  const Sequences sequences(x, cu_seqlens);
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using S = Wide<T>;
    const Tensor filter = cast(filter_any, dtype_of<S>());
    const Tensor skip = skip_any ? cast(skip_any, dtype_of<S>()) : Tensor();
    const Forward<T> forward{Rows3<const T>(x),
                             Rows3<const T>(gate_in),
                             Rows3<const T>(gate_out),
                             Rows3<T>(y),
                             filter.data<S>(),
                             skip.defined() ? skip.data<S>() : nullptr,
                             filter.size(1),
                             x.size(2),
                             sequences.longest()};
    const Grid grid(x.size(2), Vec<T>::N, sequences.count());
    grid.run(x.numel(), [&](int64_t block, int64_t group) {
      forward.run(sequences, grid.begin(group), grid.begin(group + 1), block * Vec<T>::N);
    });
  });
  return y;
}

// dx, dfilter, dgate_in, dgate_out, dskip; what belongs to an absent argument has no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> long_conv_backward(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& filter_any, const OptionalTensor& gate_in_any,
    const OptionalTensor& gate_out_any, const OptionalTensor& skip_any, const OptionalTensor& cu_seqlens) {
  check(x_any, filter_any, gate_in_any, gate_out_any, skip_any);
  require(dy_any.same_shape(x_any) && dy_any.dtype() == x_any.dtype(),
          "long_conv: dy must have the shape and dtype of x");
  const Tensor dy = last_contiguous(dy_any), x = last_contiguous(x_any);
  const Tensor gate_in = optional_rows(gate_in_any), gate_out = optional_rows(gate_out_any);
  const auto like = [&](bool present) { return present ? empty_like(x) : empty({0}, x.dtype()); };
  Tensor dx = empty_like(x), dgate_in = like(gate_in.defined()), dgate_out = like(gate_out.defined());
  Tensor dfilter, dskip;
  const Sequences sequences(x, cu_seqlens);
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using S = Wide<T>;
    using V = Vec<T>;
    constexpr DType kWide = dtype_of<S>();
    const Tensor filter = cast(filter_any, kWide), skip = skip_any ? cast(skip_any, kWide) : Tensor();
    const int64_t width = x.size(2), longest = sequences.longest(), taps = filter.size(1);
    const int64_t reach = longest < taps ? longest : taps;
    const bool nothing = x.numel() == 0;
    const Backward<T> backward{Rows3<const T>(dy),
                               Rows3<const T>(x),
                               Rows3<const T>(gate_in),
                               Rows3<const T>(gate_out),
                               Rows3<T>(dx),
                               gate_in.defined() ? Rows3<T>(dgate_in) : Rows3<T>(),
                               gate_out.defined() ? Rows3<T>(dgate_out) : Rows3<T>(),
                               filter.data<S>(),
                               skip.defined() ? skip.data<S>() : nullptr,
                               taps,
                               width,
                               longest};
    const Grid grid(width, V::N, sequences.count());
    Tensor skip_partial = nothing ? zeros({1, width}, kWide) : empty({grid.groups, grid.blocks * V::N}, kWide);
    Tensor dtaps = nothing ? zeros({width, taps}, kWide) : empty({width, taps}, kWide);
    Tensor dskip_sum = empty({skip.defined() ? width : 0}, kWide);
    S* skip_data = skip_partial.mutable_data<S>();
    if (!nothing) {
      const FilterSums<V> filter_sums(grid, reach, width, taps, dtaps.mutable_data<S>());
      grid.run(x.numel(), [&](int64_t block, int64_t group) {
        Scratch scratch;
        S* column = filter_sums.column(block, group, scratch);
        backward.run(sequences, grid.begin(group), grid.begin(group + 1), block * V::N, reach, column,
                     skip_data + (group * grid.blocks + block) * V::N);
        filter_sums.done(block, column);
      });
      filter_sums.finish();
    }
    S* sums = dskip_sum.mutable_data<S>();
    for (int64_t c = 0; c < dskip_sum.numel(); ++c) {
      sums[c] = 0;
      for (int64_t group = 0; group < skip_partial.size(0); ++group) {
        sums[c] += skip_data[group * skip_partial.size(1) + c];
      }
    }
    dfilter = cast(dtaps, filter_any.dtype());
    dskip = skip.defined() ? cast(dskip_sum, skip_any.dtype()) : std::move(dskip_sum);
  });
  return {std::move(dx), std::move(dfilter), std::move(dgate_in), std::move(dgate_out), std::move(dskip)};
}

STAR_OPERATOR(
    "long_conv(Tensor x, Tensor filter, Tensor? gate_in, Tensor? gate_out, Tensor? skip, Tensor? cu_seqlens) -> Tensor",
    long_conv);
STAR_OPERATOR(
    "long_conv_backward(Tensor dy, Tensor x, Tensor filter, Tensor? gate_in, Tensor? gate_out, Tensor? skip, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    long_conv_backward);

}  // namespace
}  // namespace star
