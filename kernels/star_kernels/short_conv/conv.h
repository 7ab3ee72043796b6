// What the forward and the backward of the short convolutions share: how the work is cut up, and the edges of a
// sequence.
//
// Tokens are taken kTile at a time, a vector of channels at a time, so that the W taps are loaded once a tile and the
// window slides through registers. The W - 1 inputs before a tile (`past`) lie in scratch memory as float32: the initial
// state, the gated product and the cut between two tiles need no case of their own.
//
// What belongs to channels rather than tokens (taps, past inputs, their gradients) lies in panels: for each vector of
// channels, its R rows of V::N numbers one after the other, the last panel filled up with zeros. One pointer then serves
// all rows; with a pointer for each the compiler ran out of registers.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "native/star.h"

namespace star {

// y = conv(x), silu(conv(x)), or gate_out * conv(gate_in * x).
enum class Kind { kPlain, kSilu, kGated };

constexpr int kTile = 8;

// Whether a vector of floats is half a line of the caches (AVX2). A tile then takes two vectors side by side, so that it
// loads and stores whole lines: of rows 4 KB apart, which share eight places of the first-level cache, the other half
// would be gone by the next vector, and half a line streamed costs as much as a whole one. The backward of
// causal_conv1d, B8 T256 D1024, takes 1.1 ms in place of 1.4, with silu 2.3 in place of 3.3 (Zen 3, two threads).
template <class V> constexpr bool kPairs = V::N == 8;

// Channels that one task takes, whole vectors: their panels (4 W rows in the backward) then stay in the first- or
// second-level cache.
constexpr int64_t kBlockChannels = 2048;

// Tokens of one sequence that one task takes: [begin, end) of the sequence [start, stop) of batch row `batch`.
struct Segment {
  int64_t sequence, batch, start, stop, begin, end;
};

// The tensors that lie along time, with their last axis contiguous. Without gates they are undefined.
struct Streams {
  Tensor x, gate_in, gate_out;
};

// Rows (B, T) of a tensor (B, T, D). One that is not there, or empty, has no strides either, so that a pointer to it can
// be moved along with the others.
template <class T> struct Plane {
  T* data = nullptr;
  int64_t batch = 0, token = 0;

  Plane() = default;
  explicit Plane(const Tensor& tensor) {
    if (!tensor || tensor.raw() == nullptr) return;
    data = const_cast<T*>(tensor.data<std::remove_const_t<T>>());
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

// Numbers in the panels of some channels, for one row.
template <class V> inline int64_t padded(int64_t channels) { return (channels + V::N - 1) / V::N * V::N; }

// Panels of W + 1 rows: the taps of every channel, then the bias.
template <class T> Tensor filter_panels(const Tensor& weight, const OptionalTensor& bias);

// Second checks, after Python's, for callers of torch.ops.
void check_filter(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
                  int64_t sequences);
void check_gates(const Tensor& x, const Tensor& gate_in, const Tensor& gate_out);

inline int64_t blocks_of(int64_t channels) { return (channels + kBlockChannels - 1) / kBlockChannels; }

// Move on to the next token. The compiler may not see that this is a multiple of the step: it would keep a pointer for
// each token of the tile.
template <class P> inline void advance(P*& pointer, int64_t step) {
  pointer += step;
  asm("" : "+r"(pointer));
}

// Between (channels, `rows`), channels adjacent to nothing, and the first `rows` of panels with `panel_rows`.
template <class V, class W = typename V::Scalar>
void to_panels(const W* matrix, int64_t rows, int64_t channels, W* panels, int64_t panel_rows) {
  for (int64_t c = 0; c < channels; c += V::N, panels += panel_rows * V::N) {
    for (int64_t w = 0; w < rows; ++w) {
      for (int64_t k = 0; k < V::N; ++k) {
        panels[w * V::N + k] = c + k < channels ? matrix[(c + k) * rows + w] : 0;
      }
    }
  }
}
template <class V, class W = typename V::Scalar>
void from_panels(const W* panels, int64_t panel_rows, int64_t rows, int64_t channels, W* matrix) {
  for (int64_t c = 0; c < channels; c += V::N, panels += panel_rows * V::N) {
    const int64_t count = channels - c < V::N ? channels - c : V::N;
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t w = 0; w < rows; ++w) matrix[(c + k) * rows + w] = panels[w * V::N + k];
    }
  }
}

inline void fill_zeros(void* data, int64_t bytes) { std::memset(data, 0, static_cast<size_t>(bytes)); }

// One of the W - 1 inputs before a segment, `index` counted from the oldest: from the state (zeros if there is none), or
// from x. Calls put(i, value, lanes) for each vector of channels.
template <class T, class F>
void past_input(const Segment& segment, const Wide<T>* state, int64_t history, const Plane<const T>& x,
                const Plane<const T>& gate_in, int64_t channel, int64_t channels, int64_t index, F&& put) {
  using V = Vec<T>;
  const int64_t from_start = segment.begin - segment.start + index;
  if (from_start >= history) {
    const int64_t token = segment.start + from_start - history;
    const T *in = x.at(segment.batch, token, channel), *gate = gate_in.at(segment.batch, token, channel);
    sweep<V>(channels, [&](int64_t i, auto lanes) {
      const V value = V::load(in + i, lanes);
      put(i, gate == nullptr ? value : value * V::load(gate + i, lanes), lanes);
    });
    return;
  }
  sweep<V>(channels, [&](int64_t i, auto lanes) {
    Wide<T> part[V::N] = {};
    for (int64_t k = 0; state != nullptr && k < V::N && i + k < channels; ++k) {
      part[k] = state[(i + k) * history + from_start];
    }
    put(i, V::load(part), lanes);
  });
}

}  // namespace star
