// What the forward and the backward of the short convolutions share: how the work is cut up, and the edges of a
// sequence.
//
// Tokens are taken kTile at a time, a vector of channels at a time, so that the W taps are loaded once a tile and the
// window slides through registers. The W - 1 inputs before a tile (`past`) lie in scratch memory as float32 rows: the
// initial state, the gated product and the cut between two tiles need no case of their own.
#pragma once

#include <vector>

#include "native/star.h"

namespace star {

// y = conv(x), silu(conv(x)), or gate_out * conv(gate_in * x).
enum class Kind { kPlain, kSilu, kGated };

constexpr int kTile = 8;

// Channels that one task takes: the rows in scratch memory (4 W of them in the backward) then stay in the first- or
// second-level cache.
constexpr int64_t kBlockChannels = 1024;

// Tokens of one sequence that one task takes: [begin, end) of the sequence [start, stop) of batch row `batch`.
struct Segment {
  int64_t sequence, batch, start, stop, begin, end;
};

// The tensors that lie along time, with their last axis contiguous. Without gates they are undefined.
struct Streams {
  Tensor x, gate_in, gate_out;
};

// Rows (B, T) of a tensor (B, T, D).
template <class T> struct Plane {
  T* data = nullptr;
  int64_t batch = 0, token = 0;

  Plane() = default;
  explicit Plane(const Tensor& tensor) {
    if (!tensor) return;
    data = const_cast<T*>(tensor.data<T>());
    batch = tensor.stride(0);
    token = tensor.stride(1);
  }
  T* at(int64_t b, int64_t t, int64_t channel) const {
    return data == nullptr ? nullptr : data + b * batch + t * token + channel;
  }
};

// Every sequence in segments of at most 512 tokens (sums over longer ones would lose accuracy) and at least 64 (a cut
// costs W - 1 tokens); about 16 tasks where the sizes allow. An empty sequence has one empty segment.
std::vector<Segment> cut(const Tensor& x, const OptionalTensor& cu_seqlens);

// (W + 1, D): tap w of every channel in row w, the bias in the last row.
template <class W> Tensor filter_rows(const Tensor& weight, const OptionalTensor& bias);

// Second checks, after Python's, for callers of torch.ops.
void check_filter(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
                  int64_t sequences);
void check_gates(const Tensor& x, const Tensor& gate_in, const Tensor& gate_out);

inline int64_t blocks_of(int64_t channels) { return (channels + kBlockChannels - 1) / kBlockChannels; }

// Between W - 1 rows `row_step` apart and the state (D, W - 1) of one sequence.
template <class W>
void state_to_rows(const W* state, int64_t history, int64_t channels, W* rows, int64_t row_step) {
  for (int64_t w = 0; w < history; ++w) {
    for (int64_t c = 0; c < channels; ++c) rows[w * row_step + c] = state[c * history + w];
  }
}
template <class W>
void rows_to_state(const W* rows, int64_t row_step, int64_t history, int64_t channels, W* state) {
  for (int64_t w = 0; w < history; ++w) {
    for (int64_t c = 0; c < channels; ++c) state[c * history + w] = rows[w * row_step + c];
  }
}

// Fill `past` with the W - 1 inputs before a segment: from the state (zeros if there is none), then from x.
template <class T>
void load_past(const Segment& segment, const Wide<T>* state, int64_t history, const Plane<const T>& x,
               const Plane<const T>& gate_in, int64_t channel, int64_t channels, Wide<T>* past) {
  using V = Vec<T>;
  const int64_t offset = segment.begin - segment.start;
  for (int64_t w = 0; w < history; ++w) {
    Wide<T>* row = past + w * channels;
    const int64_t index = offset + w;
    if (index < history) {
      for (int64_t c = 0; c < channels; ++c) row[c] = state == nullptr ? 0 : state[c * history + index];
      continue;
    }
    const int64_t token = segment.start + index - history;
    const T *in = x.at(segment.batch, token, channel), *gate = gate_in.at(segment.batch, token, channel);
    sweep<V>(channels, [=](int64_t i, auto lanes) {
      const V value = V::load(in + i, lanes);
      (gate == nullptr ? value : value * V::load(gate + i, lanes)).store(row + i, lanes);
    });
  }
}

}  // namespace star
