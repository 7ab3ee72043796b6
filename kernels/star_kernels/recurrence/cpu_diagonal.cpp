// The diagonal scan h_t = decay_t h_{t-1} + x_t, and its one-token step.
#include "recurrence/diagonal.h"

namespace star {
namespace {

struct Diagonal {
  static constexpr int kInputs = 2;  // decay, x
  static constexpr int kKept = 0;
  static constexpr int kVectors = 16;
  static constexpr int kOperations = 1;  // of an element, in units of a simple one

  template <class V>
  static inline __attribute__((always_inline)) void terms(const V* in, V, V& a, V& v, V*) {
    a = in[0];
    v = in[1];
  }
  template <class V>
  static inline __attribute__((always_inline)) void gradients(const V* in, V, const V*, V h, V g, V& a, V* din, V&) {
    a = in[0];
    din[0] = g * h;
    din[1] = g;
  }
};

// The scan has no parameter: zeros stand for it.
Tensor no_parameter(const Tensor& x) {
  return zeros({x.size(-1)}, x.dtype() == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
}

std::tuple<Tensor, Tensor, Tensor> diagonal_scan(const Tensor& decay, const Tensor& x,
                                                 const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                 bool keep) {
  require(x.dim() == 3, "diagonal_scan: x must be (B, T, D)");
  return diagonal_forward<Diagonal>({&decay, &x}, no_parameter(x), initial_state, cu_seqlens, keep);
}

std::tuple<Tensor, Tensor, Tensor> diagonal_scan_backward(const OptionalTensor& dh, const OptionalTensor& dfinal_state,
                                                          const Tensor& decay, const Tensor& x,
                                                          const OptionalTensor& initial_state,
                                                          const OptionalTensor& cu_seqlens, const Tensor& kept) {
  require(x.dim() == 3, "diagonal_scan: x must be (B, T, D)");
  auto gradients = diagonal_backward<Diagonal>(dh, dfinal_state, {&decay, &x}, no_parameter(x), initial_state,
                                               cu_seqlens, kept);
  return {std::move(gradients.inputs[0]), std::move(gradients.inputs[1]),
          initial_state ? cast(gradients.state, initial_state.dtype()) : std::move(gradients.state)};
}

std::tuple<Tensor, Tensor> diagonal_scan_step(const Tensor& state_any, const Tensor& decay_any, const Tensor& x_any) {
  require(x_any.dim() == 2 && decay_any.same_shape(x_any) && state_any.same_shape(x_any) &&
              decay_any.dtype() == x_any.dtype(),
          "diagonal_scan_step: state, decay and x must be (B, D)");
  const Tensor decay = last_contiguous(decay_any), x = last_contiguous(x_any);
  Tensor h = empty_like(x);
  Tensor new_state;
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    const Tensor state = cast(state_any, dtype_of<Wide<T>>());
    new_state = empty_like(state);
    const T *decay_data = decay.data<T>(), *x_data = x.data<T>();
    const Wide<T>* state_data = state.data<Wide<T>>();
    Wide<T>* new_data = new_state.mutable_data<Wide<T>>();
    T* h_data = h.mutable_data<T>();
    parallel_runs({&state, &decay, &x}, [=](const int64_t* offsets, int64_t out, int64_t count) {
      sweep<V>(count, [=](int64_t i, auto lanes) {
        const V value = fma(V::load(decay_data + offsets[1] + i, lanes), V::load(state_data + offsets[0] + i, lanes),
                            V::load(x_data + offsets[2] + i, lanes));
        value.store(new_data + out + i, lanes);
        value.store(h_data + out + i, lanes);
      });
    });
  });
  return {std::move(h), std::move(new_state)};
}

STAR_OPERATOR(
    "diagonal_scan(Tensor decay, Tensor x, Tensor? initial_state, Tensor? cu_seqlens, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    diagonal_scan);
STAR_OPERATOR(
    "diagonal_scan_backward(Tensor? dh, Tensor? dfinal_state, Tensor decay, Tensor x, Tensor? initial_state,"
    " Tensor? cu_seqlens, Tensor kept) -> (Tensor, Tensor, Tensor)",
    diagonal_scan_backward);
STAR_OPERATOR("diagonal_scan_step(Tensor state, Tensor decay, Tensor x) -> (Tensor, Tensor)", diagonal_scan_step);

}  // namespace
}  // namespace star
