// The checks and the list of sequences behind every attention operator.
#include "attention/cpu_tiles.h"

namespace star {
namespace tiles {
namespace {

int64_t entry(const Tensor& ends, int64_t i) {
  return ends.dtype() == DType::kInt32 ? ends.data<int32_t>()[i] : ends.data<int64_t>()[i];
}

void check_ends(const Tensor& ends, int64_t tokens) {
  require(ends.dim() == 1 && ends.size(0) >= 1, "attention: cu_seqlens must be (S + 1,)");
  const int64_t last = ends.size(0) - 1;
  require(entry(ends, 0) == 0 && entry(ends, last) == tokens, "attention: cu_seqlens must run from 0 to T");
  for (int64_t i = 0; i < last; ++i) require(entry(ends, i) <= entry(ends, i + 1), "attention: cu_seqlens must rise");
}

}  // namespace

Problem::Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ends_q_any, const Tensor& ends_k_any,
                 bool is_causal, int64_t window_size)
    : causal(is_causal), window(window_size) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v must have 4 axes (B, T, H, D)");
  const int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1);
  heads = q.size(2), key_heads = k.size(2), width = q.size(3), value_width = v.size(3);
  require(k.size(0) == batch && k.size(3) == width, "attention: k must be (B, Tk, Hk, D)");
  require(v.size(0) == batch && v.size(1) == keys && v.size(2) == key_heads, "attention: v must be (B, Tk, Hk, Dv)");
  require(k.dtype() == q.dtype() && v.dtype() == q.dtype(), "attention: q, k and v must have one dtype");
  require(key_heads > 0 && heads % key_heads == 0, "attention: the heads of k must divide those of q");
  require(window <= 0 || causal, "attention: a window needs a causal mask");
  group = heads / key_heads;
  require(ends_q_any.defined() == ends_k_any.defined(), "attention: packed sequences take both cu_seqlens");
  if (!ends_q_any.defined()) {
    for (int64_t b = 0; b < batch; ++b) sequences.push_back({b, 0, queries, 0, keys});
    return;
  }
  const Tensor ends_q = contiguous(ends_q_any), ends_k = contiguous(ends_k_any);
  require(batch == 1 && ends_q.dim() == 1 && ends_k.same_shape(ends_q),
          "attention: packed sequences need B == 1 and boundaries of one shape");
  check_ends(ends_q, queries);
  check_ends(ends_k, keys);
  for (int64_t i = 0; i + 1 < ends_q.size(0); ++i) {
    const int64_t q0 = entry(ends_q, i), k0 = entry(ends_k, i);
    sequences.push_back({0, q0, entry(ends_q, i + 1) - q0, k0, entry(ends_k, i + 1) - k0});
  }
}

Tensor wide_heads(const Tensor& parameter, const Tensor& q, const char* message) {
  if (!parameter.defined()) return Tensor();
  const int64_t heads = q.size(-2);
  require(parameter.dim() == 0 || (parameter.dim() == 1 && parameter.size(0) == heads), message);
  Tensor wide = cast(parameter, wide_of(q));
  if (parameter.dim() == 1) return wide;
  Tensor spread = empty({heads}, wide_of(q));
  dispatch_dtype(wide_of(q), [&](auto element) {
    using T = decltype(element);
    for (int64_t h = 0; h < heads; ++h) spread.mutable_data<T>()[h] = *wide.data<T>();
  });
  return spread;
}

void check_second_map(const Tensor& q1, const Tensor& k1, const Tensor& q2, const Tensor& k2) {
  require(q2.same_shape(q1) && k2.same_shape(k1) && q2.dtype() == q1.dtype() && k2.dtype() == q1.dtype(),
          "differential_attention: q2 and k2 must have the shape and dtype of q1 and k1");
}

}  // namespace tiles
}  // namespace star
