// h_t = a_t h_{t-1} + v_t over channels, where an operator says how a and v follow from its inputs.
//
// An `Op` has
//   kInputs, kKept                                       inputs (B, T, D), and vectors kept for a token's gradient
//   kVectors                                             vectors of a tile
//   terms(in, parameter, a, v, kept)                     a and v
//   gradients(in, parameter, kept, h, g, a, din, dp)     from h = h_{t-1} and g, the gradient at h_t: a again, the
//                                                        inputs' gradients, and the parameter's, added to dp
//
// Lanes are channels. A task takes a tile of K vectors of one sequence through time with its state in registers. Wide
// tiles suit the caches (narrow columns at a stride of 4 KB fall into the same sets), narrow ones the registers: four
// vectors are best for the RG-LRU, sixteen for the plain scan (0.9 ms for the backward of 1024 x 1024, with four 1.5).
#pragma once

#include "recurrence/scan.h"

namespace star {

template <class Op, class T> struct DiagonalInputs {
  using W = Wide<T>;
  Track<T> in[Op::kInputs];
  const W* parameter;  // (D,)
  int64_t width;
  bool stream;  // the outputs past the caches
};

// diagonal_scan of tensors of 16 MB, both directions: 7.2 to 5.7 ms (Zen 3, two threads). Not measured elsewhere.
template <class T> inline void put_output(Vec<T> value, T* to, Full, bool stream) {
  if constexpr (VecF::N == 8) return put(value, to, Full{}, stream);
  value.store(to);
}
template <class T> inline void put_output(Vec<T> value, T* to, Lanes lanes, bool) { value.store(to, lanes); }

// Rows are too far apart for the processor to see the pattern: ask for a tile's part of a row.
template <int kElements, class T> inline void prefetch_tile(const T* data) {
  constexpr int kLine = 64 / sizeof(T);
  STAR_UNROLL for (int i = 0; i < kElements; i += kLine) __builtin_prefetch(data + i);
}

// Tokens [begin, end) of a tile; `state` goes from before the first to after the last.
template <class Op, class T, int K, class L>
void diagonal_forward_tile(const DiagonalInputs<Op, T>& inputs, int64_t row, int64_t channel, int64_t begin,
                           int64_t end, Wide<T>* state, T* h_out, L lanes) {
  using V = Vec<T>;
  const bool stream = inputs.stream;  // read once: for the compiler, a store may change it
  V h[K], parameter[K];
  STAR_UNROLL for (int k = 0; k < K; ++k) {
    h[k] = V::load(state + k * V::N, lanes);
    parameter[k] = V::load(inputs.parameter + channel + k * V::N, lanes);
  }
  const T* in[Op::kInputs];
  STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) in[i] = inputs.in[i].at(row, begin) + channel;
  for (int64_t t = begin; t < end; ++t) {
    STAR_UNROLL for (int k = 0; k < K; ++k) {
      V values[Op::kInputs], kept[Op::kKept + 1], a, v;
      STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) values[i] = V::load(in[i] + k * V::N, lanes);
      Op::terms(values, parameter[k], a, v, kept);
      h[k] = fma(a, h[k], v);
      put_output<T>(h[k], h_out + k * V::N, lanes, stream);
    }
    STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) in[i] += inputs.in[i].time;
    h_out += inputs.width;
  }
  STAR_UNROLL for (int k = 0; k < K; ++k) h[k].store(state + k * V::N, lanes);
}

// One block backwards: `start` is the state before `begin`; `carry` the gradient of the state after `end`, which
// becomes that of the one before `begin`. `dh` may be null.
template <class Op, class T, int K, class L>
void diagonal_backward_tile(const DiagonalInputs<Op, T>& inputs, const Track<T>& dh, int64_t row, int64_t channel,
                            int64_t begin, int64_t end, const Wide<T>* start, Wide<T>* carry, T* const* din,
                            Wide<T>* dparameter, Wide<T>* scratch, L lanes) {
  using V = Vec<T>;
  constexpr int kSaved = Op::kKept + 1;  // h_{t-1} first
  V h[K], parameter[K];
  STAR_UNROLL for (int k = 0; k < K; ++k) {
    h[k] = V::load(start + k * V::N, lanes);
    parameter[k] = V::load(inputs.parameter + channel + k * V::N, lanes);
  }
  for (int64_t t = begin; t < end; ++t) {
    const T* in[Op::kInputs];
    STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) in[i] = inputs.in[i].at(row, t) + channel;
    Wide<T>* saved = scratch + (t - begin) * K * kSaved * V::N;
    if (dh) prefetch_tile<K * V::N>(dh.at(row, t) + channel);
    STAR_UNROLL for (int k = 0; k < K; ++k) {
      V values[Op::kInputs], kept[kSaved], a, v;
      STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) values[i] = V::load(in[i] + k * V::N, lanes);
      Op::terms(values, parameter[k], a, v, kept);
      h[k].store(saved + k * kSaved * V::N);
      STAR_UNROLL for (int i = 0; i < Op::kKept; ++i) kept[i].store(saved + (k * kSaved + 1 + i) * V::N);
      h[k] = fma(a, h[k], v);
    }
  }
  const bool stream = inputs.stream;
  V pull[K], dp[K];
  STAR_UNROLL for (int k = 0; k < K; ++k) {
    pull[k] = V::load(carry + k * V::N, lanes);
    dp[k] = V(Wide<T>(0));
  }
  for (int64_t t = end - 1; t >= begin; --t) {
    const T* in[Op::kInputs];
    STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) in[i] = inputs.in[i].at(row, t) + channel;
    const T* dh_t = dh ? dh.at(row, t) + channel : nullptr;
    const int64_t out = t * inputs.width;
    const Wide<T>* saved = scratch + (t - begin) * K * kSaved * V::N;
    STAR_UNROLL for (int k = 0; k < K; ++k) {
      V values[Op::kInputs], kept[kSaved], dvalues[Op::kInputs], a;
      STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) values[i] = V::load(in[i] + k * V::N, lanes);
      const V before = V::load(saved + k * kSaved * V::N);
      STAR_UNROLL for (int i = 0; i < Op::kKept; ++i) kept[i] = V::load(saved + (k * kSaved + 1 + i) * V::N);
      const V g = dh_t != nullptr ? pull[k] + V::load(dh_t + k * V::N, lanes) : pull[k];
      Op::gradients(values, parameter[k], kept, before, g, a, dvalues, dp[k]);
      STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) put_output<T>(dvalues[i], din[i] + out + k * V::N, lanes, stream);
      pull[k] = g * a;
    }
  }
  STAR_UNROLL for (int k = 0; k < K; ++k) {
    pull[k].store(carry + k * V::N, lanes);
    // A sum for each block, then one over blocks: errors grow with the root of 64 tokens, not of all.
    (dp[k] + V::load(dparameter + k * V::N, lanes)).store(dparameter + k * V::N, lanes);
  }
}

// Call body(channel, vectors, lanes) for the tiles that cover channels [begin, end): of kVectors vectors, then of four,
// then of one.
template <class V, int kVectors, class F> inline void over_tiles(int64_t begin, int64_t end, F&& body) {
  int64_t c = begin;
  for (; c + kVectors * V::N <= end; c += kVectors * V::N) body(c, std::integral_constant<int, kVectors>{}, Full{});
  if constexpr (kVectors > 4) {
    for (; c + 4 * V::N <= end; c += 4 * V::N) body(c, std::integral_constant<int, 4>{}, Full{});
  }
  for (; c + V::N <= end; c += V::N) body(c, std::integral_constant<int, 1>{}, Full{});
  if constexpr (V::N > 1) {
    if (c < end) body(c, std::integral_constant<int, 1>{}, Lanes{static_cast<int>(end - c)});
  }
}

// How a task's channels are cut out: tiles of kVectors vectors, or of four where threads would be idle. No result
// depends on it.
struct Shares {
  int64_t width, channels, parts;

  Shares(int64_t num_channels, int64_t sequences, int vectors) : width(num_channels), channels(vectors * VecF::N) {
    if (sequences * ((width + channels - 1) / channels) < num_threads()) channels = 4 * VecF::N;
    parts = (width + channels - 1) / channels;
  }
  int64_t first(int64_t task) const { return task % parts * channels; }
  int64_t last(int64_t task) const {
    const int64_t end = first(task) + channels;
    return end < width ? end : width;
  }
};

template <int K> void check_diagonal(const Tensor* const (&inputs)[K], const Tensor& parameter) {
  for (const Tensor* one : inputs) {
    require(one->dim() == 3 && one->same_shape(*inputs[0]) && one->dtype() == inputs[0]->dtype(),
            "diagonal recurrence: the inputs must be (B, T, D) of one dtype");
  }
  require(parameter.dim() == 1 && parameter.size(0) == inputs[0]->size(2), "diagonal recurrence: needs (D,)");
}

// Returns h (B, T, D), the final states (S, D), and the kept states, flat, (B, slots, D): no slots unless
// `keep`.
template <class Op>
std::tuple<Tensor, Tensor, Tensor> diagonal_forward(const Tensor* const (&any)[Op::kInputs], const Tensor& parameter,
                                                    const OptionalTensor& initial_state,
                                                    const OptionalTensor& cu_seqlens, bool keep) {
  check_diagonal(any, parameter);
  const Sequences sequences(*any[0], cu_seqlens);
  const int64_t length = any[0]->size(1), width = any[0]->size(2), slots = keep ? scan_slots(length) : 0;
  Tensor h = empty_like(*any[0]);
  Tensor final_state, kept;
  dispatch_dtype(any[0]->dtype(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Tensor inputs[Op::kInputs];
    DiagonalInputs<Op, T> tracks;
    for (int i = 0; i < Op::kInputs; ++i) {
      inputs[i] = last_contiguous(*any[i]);
      tracks.in[i] = Track<T>(inputs[i]);
    }
    tracks.parameter = parameter.data<W>();
    tracks.width = width;
    tracks.stream = stream_rows(h, Op::kInputs + 1);
    const Tensor start = starting_states<W>(initial_state, {sequences.count(), width});
    final_state = empty({sequences.count(), width}, dtype_of<W>());
    kept = empty({any[0]->size(0) * slots * width}, dtype_of<W>());
    const W* start_data = start.data<W>();
    W *state_data = final_state.mutable_data<W>(), *kept_data = kept.mutable_data<W>();
    T* h_data = h.mutable_data<T>();
    const Shares shares(width, sequences.count(), Op::kVectors);
    scan_tasks(sequences.count() * shares.parts, h.numel() * Op::kOperations, [&](int64_t task) {
      const int64_t s = task / shares.parts, row = sequences.row(s);
      const auto take = [&](int64_t channel, auto vectors, auto lanes) {
        constexpr int K = decltype(vectors)::value;
        using V = Vec<T>;
        W* state = state_data + s * width + channel;
        const auto copy_to = [&](const W* from, W* to) {
          for (int k = 0; k < K; ++k) V::load(from + k * V::N, lanes).store(to + k * V::N, lanes);
        };
        copy_to(start_data + s * width + channel, state);
        for (int64_t t = sequences.begin(s), end = sequences.end(s); t < end; t = block_end(t, end)) {
          if (slots > 0 && t % kScanBlock == 0) {
            copy_to(state, kept_data + (row * slots + t / kScanBlock) * width + channel);
          }
          diagonal_forward_tile<Op, T, K>(tracks, row, channel, t, block_end(t, end), state,
                                          h_data + (row * length + t) * width + channel, lanes);
        }
      };
      over_tiles<Vec<T>, Op::kVectors>(shares.first(task), shares.last(task), take);
      finish_streaming(tracks.stream);
    });
  });
  return {std::move(h), std::move(final_state), std::move(kept)};
}

template <class Op> struct DiagonalGradients {
  Tensor inputs[Op::kInputs];
  Tensor parameter;  // (D,), in the type that states are held in
  Tensor state;      // (S, D), likewise
};

template <class Op>
DiagonalGradients<Op> diagonal_backward(const OptionalTensor& dh_any, const OptionalTensor& dfinal_state,
                                        const Tensor* const (&any)[Op::kInputs], const Tensor& parameter,
                                        const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                        const Tensor& kept_any) {
  check_diagonal(any, parameter);
  require(!dh_any || (dh_any.same_shape(*any[0]) && dh_any.dtype() == any[0]->dtype()),
          "diagonal recurrence: dh must have the shape and dtype of h");
  const Sequences sequences(*any[0], cu_seqlens);
  const int64_t length = any[0]->size(1), width = any[0]->size(2), slots = scan_slots(length);
  Tensor kept = kept_any.alias();
  if (kept.numel() == 0) kept = std::get<2>(diagonal_forward<Op>(any, parameter, initial_state, cu_seqlens, true));
  require(kept.numel() == any[0]->size(0) * slots * width, "diagonal recurrence: kept must hold (B, slots, D)");
  kept = contiguous(kept);
  DiagonalGradients<Op> gradients;
  for (Tensor& one : gradients.inputs) one = empty_like(*any[0]);
  dispatch_dtype(any[0]->dtype(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Tensor inputs[Op::kInputs];
    DiagonalInputs<Op, T> tracks;
    tracks.stream = stream_rows(gradients.inputs[0], 2 * Op::kInputs + 1);
    T* din_data[Op::kInputs];
    for (int i = 0; i < Op::kInputs; ++i) {
      inputs[i] = last_contiguous(*any[i]);
      tracks.in[i] = Track<T>(inputs[i]);
      Tensor& din = gradients.inputs[i];
      tracks.stream = tracks.stream && on_line(din.raw());
      din_data[i] = din.mutable_data<T>();
    }
    tracks.parameter = parameter.data<W>();
    tracks.width = width;
    Tensor dh_tensor;
    if (dh_any) dh_tensor = last_contiguous(dh_any);
    const Track<T> dh(dh_tensor);
    const Tensor start = starting_states<W>(initial_state, {sequences.count(), width});
    const Tensor pull = starting_states<W>(dfinal_state, {sequences.count(), width});
    Tensor& dstate = gradients.state;
    dstate = empty({sequences.count(), width}, dtype_of<W>());
    Tensor partial = zeros({sequences.count(), width}, dtype_of<W>());
    const W *start_data = start.data<W>(), *pull_data = pull.data<W>(), *kept_data = kept.data<W>();
    W *carry_data = dstate.mutable_data<W>(), *partial_data = partial.mutable_data<W>();
    const Shares shares(width, sequences.count(), Op::kVectors);
    scan_tasks(sequences.count() * shares.parts, any[0]->numel() * 2 * Op::kOperations, [&](int64_t task) {
      const int64_t s = task / shares.parts, row = sequences.row(s);
      Scratch scratch;
      W* saved = scratch.get<W>(kScanBlock * (Op::kKept + 1) * Op::kVectors * Vec<T>::N);
      const auto take = [&](int64_t channel, auto vectors, auto lanes) {
        constexpr int K = decltype(vectors)::value;
        using V = Vec<T>;
        const int64_t own = s * width + channel;
        for (int k = 0; k < K; ++k) {
          V::load(pull_data + own + k * V::N, lanes).store(carry_data + own + k * V::N, lanes);
        }
        T* din[Op::kInputs];
        for (int i = 0; i < Op::kInputs; ++i) din[i] = din_data[i] + row * length * width + channel;
        const int64_t begin = sequences.begin(s);
        for (int64_t end = sequences.end(s); end > begin; end = block_begin(end, begin)) {
          const int64_t t = block_begin(end, begin);
          const W* state = t % kScanBlock == 0 ? kept_data + (row * slots + t / kScanBlock) * width + channel
                                               : start_data + own;
          diagonal_backward_tile<Op, T, K>(tracks, dh, row, channel, t, end, state, carry_data + own, din,
                                           partial_data + own, saved, lanes);
        }
      };
      over_tiles<Vec<T>, Op::kVectors>(shares.first(task), shares.last(task), take);
      finish_streaming(tracks.stream);
    });
    gradients.parameter = add_sequences<W>(partial, {width}, dtype_of<W>());
  });
  return gradients;
}

}  // namespace star
