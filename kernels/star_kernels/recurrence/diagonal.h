// h_t = a_t h_{t-1} + v_t over channels, where an operator says how a and v follow from its inputs.
//
// An `Op` has
//   kInputs, kKept                                       inputs (B, T, D), and vectors kept for a token's gradient
//   terms(in, parameter, a, v, kept)                     a and v
//   gradients(in, parameter, kept, h, g, a, din, dp)     from h = h_{t-1} and g, the gradient at h_t: a again, the
//                                                        inputs' gradients, and the parameter's, added to dp
//
// Lanes are channels. A task takes a segment of up to 256 channels of one sequence through time, row by row: rows of a
// kilobyte are what the processor's prefetchers see, and columns of 256 bytes at a stride of 4 KB fall into the same sets
// of the caches (1.0 ms for the backward of 1024 x 1024 instead of 1.5).
#pragma once

#include "recurrence/scan.h"

namespace star {

template <class Op, class T> struct DiagonalInputs {
  using W = Wide<T>;
  Track<T> in[Op::kInputs];
  const W* parameter;  // (D,)
  int64_t width;
};

// The channels of a task: [first, first + channels) of a sequence.
struct Segment {
  int64_t sequence, row, first, channels;
};

// Segments that cover the channels of every sequence: equal ones, and narrower than the widest where threads would be
// idle. No result depends on where they are cut.
struct Segments {
  int64_t width, parts, segment;

  Segments(int64_t num_channels, int64_t sequences, int64_t widest) : width(num_channels), segment(widest) {
    while (segment > 64 && sequences * ((width + segment - 1) / segment) < num_threads()) segment /= 2;
    parts = (width + segment - 1) / segment;
    if (parts > 0) segment = ((width + parts - 1) / parts + 15) / 16 * 16;
  }
  Segment at(int64_t task, const Sequences& sequences) const {
    const int64_t s = task / parts, first = task % parts * segment, left = width - first;
    return {s, sequences.row(s), first, left < segment ? (left < 0 ? 0 : left) : segment};
  }
};

template <class W> inline void copy_channels(const W* from, W* to, int64_t channels) {
  if (channels > 0) std::memcpy(to, from, static_cast<size_t>(channels) * sizeof(W));
}

// Call body(c, vectors, lanes) over a row, kVectors vectors at once and then one by one: the chain from a gate to a
// state is so long that the processor alone does not find the next vector's work behind it.
template <class V, int kVectors, class F> inline __attribute__((always_inline)) void sweep_row(int64_t count, F&& body) {
  int64_t c = 0;
  for (; c + kVectors * V::N <= count; c += kVectors * V::N) body(c, std::integral_constant<int, kVectors>{}, Full{});
  sweep<V>(count - c, [&](int64_t i, auto lanes) { body(c + i, std::integral_constant<int, 1>{}, lanes); });
}

// Tokens [begin, end); `state` goes from before the first to after the last.
template <class Op, class T>
void diagonal_forward_block(const DiagonalInputs<Op, T>& inputs, const Segment& own, int64_t begin, int64_t end,
                            Wide<T>* state, T* h_out) {
  using V = Vec<T>;
  const Wide<T>* parameter = inputs.parameter + own.first;
  for (int64_t t = begin; t < end; ++t) {
    const T* in[Op::kInputs];
    STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) in[i] = inputs.in[i].at(own.row, t) + own.first;
    sweep_row<V, Op::kVectors>(own.channels, [=](int64_t c, auto vectors, auto lanes) {
      STAR_UNROLL for (int k = 0; k < vectors; ++k) {
        const int64_t at = c + k * V::N;
        V values[Op::kInputs], kept[Op::kKept + 1], a, v;
        STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) values[i] = V::load(in[i] + at, lanes);
        Op::terms(values, V::load(parameter + at, lanes), a, v, kept);
        const V h = fma(a, V::load(state + at, lanes), v);
        h.store(state + at, lanes);
        h.store(h_out + at, lanes);
      }
    });
    h_out += inputs.width;
  }
}

// One block backwards: `start` is the state before `begin`, `carry` the gradient of the state after `end`, which becomes
// that of the one before `begin`. `dh` may be null. `scratch`: (tokens + 1, 1 + kKept, kSegment) with h_{t-1} first.
template <class Op, class T>
void diagonal_backward_block(const DiagonalInputs<Op, T>& inputs, const Track<T>& dh, const Segment& own, int64_t begin,
                             int64_t end, const Wide<T>* start, Wide<T>* carry, T* const* din, Wide<T>* dparameter,
                             Wide<T>* scratch) {
  using V = Vec<T>;
  using W = Wide<T>;
  constexpr int64_t kRow = (Op::kKept + 1) * Op::kSegment;
  const W* parameter = inputs.parameter + own.first;
  copy_channels(start, scratch, own.channels);
  for (int64_t t = begin; t < end; ++t) {
    const T* in[Op::kInputs];
    STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) in[i] = inputs.in[i].at(own.row, t) + own.first;
    W* saved = scratch + (t - begin) * kRow;
    sweep_row<V, Op::kVectors>(own.channels, [=](int64_t c, auto vectors, auto lanes) {
      STAR_UNROLL for (int k = 0; k < vectors; ++k) {
        const int64_t at = c + k * V::N;
        V values[Op::kInputs], kept[Op::kKept + 1], a, v;
        STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) values[i] = V::load(in[i] + at, lanes);
        Op::terms(values, V::load(parameter + at, lanes), a, v, kept);
        STAR_UNROLL for (int i = 0; i < Op::kKept; ++i) kept[i].store(saved + (i + 1) * Op::kSegment + at, lanes);
        // The row after the last token's is written too, and not read.
        fma(a, V::load(saved + at, lanes), v).store(saved + kRow + at, lanes);
      }
    });
  }
  for (int64_t t = end - 1; t >= begin; --t) {
    const T* in[Op::kInputs];
    T* out[Op::kInputs];
    STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) {
      in[i] = inputs.in[i].at(own.row, t) + own.first;
      out[i] = din[i] + t * inputs.width;
    }
    const T* dh_t = dh ? dh.at(own.row, t) + own.first : nullptr;
    const W* saved = scratch + (t - begin) * kRow;
    sweep_row<V, Op::kVectors>(own.channels, [=](int64_t c, auto vectors, auto lanes) {
      STAR_UNROLL for (int k = 0; k < vectors; ++k) {
        const int64_t at = c + k * V::N;
        V values[Op::kInputs], kept[Op::kKept + 1], dvalues[Op::kInputs], a, dp(W(0));
        STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) values[i] = V::load(in[i] + at, lanes);
        STAR_UNROLL for (int i = 0; i < Op::kKept; ++i) kept[i] = V::load(saved + (i + 1) * Op::kSegment + at, lanes);
        V g = V::load(carry + at, lanes);
        if (dh_t != nullptr) g = g + V::load(dh_t + at, lanes);
        Op::gradients(values, V::load(parameter + at, lanes), kept, V::load(saved + at, lanes), g, a, dvalues, dp);
        STAR_UNROLL for (int i = 0; i < Op::kInputs; ++i) dvalues[i].store(out[i] + at, lanes);
        (g * a).store(carry + at, lanes);
        if constexpr (Op::kHasParameter) (dp + V::load(dparameter + at, lanes)).store(dparameter + at, lanes);
      }
    });
  }
}

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
    const Tensor start = starting_states<W>(initial_state, {sequences.count(), width});
    final_state = empty({sequences.count(), width}, dtype_of<W>());
    kept = empty({any[0]->size(0) * slots * width}, dtype_of<W>());
    const W* start_data = start.data<W>();
    W *state_data = final_state.mutable_data<W>(), *kept_data = kept.mutable_data<W>();
    T* h_data = h.mutable_data<T>();
    const Segments segments(width, sequences.count(), Op::kSegment);
    scan_tasks(sequences.count() * segments.parts, h.numel() * Op::kOperations, [&](int64_t task) {
      const Segment own = segments.at(task, sequences);
      const int64_t s = own.sequence, offset = s * width + own.first;
      W* state = state_data + offset;
      copy_channels(start_data + offset, state, own.channels);
      for (int64_t t = sequences.begin(s), end = sequences.end(s); t < end; t = block_end(t, end)) {
        if (slots > 0 && t % kScanBlock == 0) {
          copy_channels(state, kept_data + (own.row * slots + t / kScanBlock) * width + own.first, own.channels);
        }
        diagonal_forward_block<Op, T>(tracks, own, t, block_end(t, end), state,
                                      h_data + (own.row * length + t) * width + own.first);
      }
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
    T* din_data[Op::kInputs];
    for (int i = 0; i < Op::kInputs; ++i) {
      inputs[i] = last_contiguous(*any[i]);
      tracks.in[i] = Track<T>(inputs[i]);
      Tensor& din = gradients.inputs[i];
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
    const Segments segments(width, sequences.count(), Op::kSegment);
    scan_tasks(sequences.count() * segments.parts, any[0]->numel() * 2 * Op::kOperations, [&](int64_t task) {
      const Segment own = segments.at(task, sequences);
      const int64_t s = own.sequence, offset = s * width + own.first, begin = sequences.begin(s);
      Scratch scratch;
      W* saved = scratch.get<W>((kScanBlock + 1) * (Op::kKept + 1) * Op::kSegment);
      copy_channels(pull_data + offset, carry_data + offset, own.channels);
      T* din[Op::kInputs];
      for (int i = 0; i < Op::kInputs; ++i) din[i] = din_data[i] + own.row * length * width + own.first;
      for (int64_t end = sequences.end(s); end > begin; end = block_begin(end, begin)) {
        const int64_t t = block_begin(end, begin);
        const W* state = t % kScanBlock == 0 ? kept_data + (own.row * slots + t / kScanBlock) * width + own.first
                                             : start_data + offset;
        diagonal_backward_block<Op, T>(tracks, dh, own, t, end, state, carry_data + offset, din, partial_data + offset,
                                       saved);
      }
    });
    gradients.parameter = add_sequences<W>(partial, {width}, dtype_of<W>());
  });
  return gradients;
}

}  // namespace star
