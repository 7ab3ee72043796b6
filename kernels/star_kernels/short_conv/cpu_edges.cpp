// How the work of the short convolutions is cut up, and what both directions prepare and check.
#include "short_conv/conv.h"

namespace star {
namespace {

int64_t boundary(const Tensor& ends, int64_t index) {
  return ends.dtype() == DType::kInt32 ? ends.data<int32_t>()[index] : ends.data<int64_t>()[index];
}

void cut_sequence(int64_t sequence, int64_t batch, int64_t start, int64_t stop, int64_t most,
                  std::vector<Segment>& segments) {
  const int64_t length = stop - start;
  const int64_t count = length <= most ? 1 : (length + most - 1) / most;
  for (int64_t k = 0; k < count; ++k) {
    segments.push_back(
        {sequence, batch, start, stop, start + length * k / count, start + length * (k + 1) / count});
  }
}

}  // namespace

std::vector<Segment> cut(const Tensor& x, const OptionalTensor& cu_seqlens) {
  constexpr int64_t kFewest = 64, kMost = 512, kTasks = 16;
  const int64_t batch = x.size(0), length = x.size(1);
  int64_t most = batch * length * blocks_of(x.size(2)) / kTasks;
  most = most < kFewest ? kFewest : (most > kMost ? kMost : most);
  std::vector<Segment> segments;
  if (!cu_seqlens) {
    for (int64_t b = 0; b < batch; ++b) cut_sequence(b, b, 0, length, most, segments);
    return segments;
  }
  const Tensor ends = contiguous(cu_seqlens);
  require(batch == 1 && ends.dim() == 1 && ends.size(0) >= 1, "short convolution: cu_seqlens needs (N + 1,) and B == 1");
  require(ends.dtype() == DType::kInt32 || ends.dtype() == DType::kInt64,
          "short convolution: cu_seqlens needs int32 or int64");
  const int64_t sequences = ends.size(0) - 1;
  bool rising = boundary(ends, 0) == 0 && boundary(ends, sequences) == length;
  for (int64_t s = 0; s < sequences; ++s) rising = rising && boundary(ends, s) <= boundary(ends, s + 1);
  require(rising, "short convolution: cu_seqlens needs boundaries that rise from 0 to T");
  for (int64_t s = 0; s < sequences; ++s) {
    cut_sequence(s, 0, boundary(ends, s), boundary(ends, s + 1), most, segments);
  }
  return segments;
}

template <class T> Tensor filter_panels(const Tensor& weight_any, const OptionalTensor& bias_any) {
  using V = Vec<T>;
  using W = Wide<T>;
  const Tensor weight = cast(weight_any, dtype_of<W>());
  const int64_t channels = weight.size(0), taps = weight.size(1);
  Tensor panels = empty({padded<V>(channels) * (taps + 1)}, dtype_of<W>());
  W* out = panels.mutable_data<W>();
  to_panels<V>(weight.data<W>(), taps, channels, out, taps + 1);
  const Tensor bias = bias_any ? cast(bias_any, dtype_of<W>()) : Tensor();
  const W* offset = bias ? bias.data<W>() : nullptr;
  const V zero(0);
  sweep<V>(channels, [=](int64_t i, auto lanes) {
    (offset == nullptr ? zero : V::load(offset + i, lanes)).store(out + i * (taps + 1) + taps * V::N);
  });
  return panels;
}
template Tensor filter_panels<float>(const Tensor&, const OptionalTensor&);
template Tensor filter_panels<bf16>(const Tensor&, const OptionalTensor&);
template Tensor filter_panels<double>(const Tensor&, const OptionalTensor&);

void check_filter(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state,
                  int64_t sequences) {
  require(weight.dim() == 2 && weight.size(0) == x.size(-1) && weight.size(1) >= 1,
          "short convolution: weight must be (D, W) with W >= 1");
  require(!bias || (bias.dim() == 1 && bias.size(0) == x.size(-1)), "short convolution: bias must be (D,)");
  require(!state || (state.dim() == 3 && state.size(0) == sequences && state.size(1) == x.size(-1) &&
                     state.size(2) == weight.size(1) - 1),
          "short convolution: a state must be (S, D, W - 1)");
}

void check_gates(const Tensor& x, const Tensor& gate_in, const Tensor& gate_out) {
  require(gate_in.same_shape(x) && gate_in.dtype() == x.dtype() && gate_out.same_shape(x) &&
              gate_out.dtype() == x.dtype(),
          "gated_short_conv: the gates must have the shape and dtype of x");
}

}  // namespace star
