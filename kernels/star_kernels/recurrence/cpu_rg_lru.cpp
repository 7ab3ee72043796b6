// The RG-LRU, h_t = a_t h_{t-1} + (1 - a_t^2)^(1/2) sigmoid(i_t) x_t with log a_t = c sigmoid(r_t) log_lambda, and its
// one-token step. Gates, decay and scan are one pass.
#include "recurrence/diagonal.h"

namespace star {
namespace {

// a = exp(log_a) and 1 - a^2. Through m = expm1(log_a), as -m (2 + m): 1 - exp(-2e-9) is 0 in float32. Above log_a = 0,
// where no decay lies, the latter is negative or NaN.
template <class V> inline __attribute__((always_inline)) void decay_and_rest(V log_a, V& a, V& rest) {
  if constexpr (V::N == 1) {
    a = exp(log_a);
    rest = -expm1(log_a + log_a);
  } else {
    // As in math.h: log_a = n ln 2 + r, and p = expm1(r) to 2^-32.
    const V x = min(V(89.0f), max(V(-104.0f), log_a)), n = round_even(x * V(constants::kLog2E));
    const V r = fnma(n, V(constants::kLn2Low), fnma(n, V(constants::kLn2High), x));
    V q(0.0001991423f);
    q = fma(q, r, V(0.001394105f));
    q = fma(q, r, V(0.008333273f));
    q = fma(q, r, V(0.041666355f));
    q = fma(q, r, V(0.16666667f));
    q = fma(q, r, V(0.5f));
    const V p = fma(r * r, q, r), power = scale_by_power_of_2(V(1.0f), n);
    a = scale_by_power_of_2(V(1.0f) + p, n);
    const V m = fma(power, p, power - V(1.0f));
    rest = -m * (V(2.0f) + m);
  }
}

struct RgLru {
  static constexpr int kInputs = 3;  // x, recurrence gate, input gate; the parameter is c log_lambda
  static constexpr int kKept = 4;    // a, scale, both gates after the sigmoid
  static constexpr int kVectors = 4;
  static constexpr int kOperations = 24;

  template <class V>
  static inline __attribute__((always_inline)) void terms(const V* in, V rate, V& a, V& v, V* kept) {
    const V recurrence = sigmoid(in[1]), input = sigmoid(in[2]);
    V rest;
    decay_and_rest(recurrence * rate, a, rest);
    const V scale = sqrt(rest);
    v = scale * (input * in[0]);
    kept[0] = a;
    kept[1] = scale;
    kept[2] = recurrence;
    kept[3] = input;
  }
  template <class V>
  static inline __attribute__((always_inline)) void gradients(const V* in, V rate, const V* kept, V h, V g, V& a,
                                                              V* din, V& dp) {
    a = kept[0];
    const V scale = kept[1], recurrence = kept[2], input = kept[3];
    const V dgated = g * scale, dscale = g * (input * in[0]);
    din[0] = dgated * input;
    din[2] = dgated * in[0] * (input * (V(1) - input));
    // d scale / d log a = -a^2 / scale, infinite at log a = 0: held at its value for 1 - a^2 = 1e-12.
    const V slope = a * a / max(V(1e-6f), scale);
    const V dlog_a = fnma(dscale, slope, g * h * a);
    const V through = dlog_a * recurrence;
    dp = dp + through;
    din[1] = through * rate * (V(1) - recurrence);
  }
};

// c log_lambda, in the type that states are held in.
Tensor rates(const Tensor& x, const Tensor& log_lambda, double c) {
  const DType wide = x.dtype() == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const Tensor from = cast(log_lambda, wide);
  Tensor to = empty_like(from);
  dispatch_dtype(wide, [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    if constexpr (!std::is_same_v<T, bf16>) {
      const T* in = from.data<T>();
      T* out = to.mutable_data<T>();
      sweep<V>(from.numel(), [=](int64_t i, auto lanes) {
        (V::load(in + i, lanes) * V(static_cast<T>(c))).store(out + i, lanes);
      });
    }
  });
  return to;
}

std::tuple<Tensor, Tensor, Tensor> rg_lru(const Tensor& x, const Tensor& recurrence_gate, const Tensor& input_gate,
                                          const Tensor& log_lambda, double c, const OptionalTensor& initial_state,
                                          const OptionalTensor& cu_seqlens, bool keep) {
  return diagonal_forward<RgLru>({&x, &recurrence_gate, &input_gate}, rates(x, log_lambda, c), initial_state,
                                 cu_seqlens, keep);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rg_lru_backward(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const Tensor& x, const Tensor& recurrence_gate,
    const Tensor& input_gate, const Tensor& log_lambda, double c, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, const Tensor& kept) {
  auto gradients = diagonal_backward<RgLru>(dh, dfinal_state, {&x, &recurrence_gate, &input_gate},
                                            rates(x, log_lambda, c), initial_state, cu_seqlens, kept);
  const Tensor dlog_lambda = rates(x, gradients.parameter, c);
  return {std::move(gradients.inputs[0]), std::move(gradients.inputs[1]), std::move(gradients.inputs[2]),
          cast(dlog_lambda, log_lambda.dtype()),
          initial_state ? cast(gradients.state, initial_state.dtype()) : std::move(gradients.state)};
}

std::tuple<Tensor, Tensor> rg_lru_step(const Tensor& state_any, const Tensor& x_any, const Tensor& recurrence_any,
                                       const Tensor& input_any, const Tensor& log_lambda, double c) {
  require(x_any.dim() == 2 && state_any.same_shape(x_any), "rg_lru_step: state and x must be (B, D)");
  require(recurrence_any.same_shape(x_any) && input_any.same_shape(x_any) && recurrence_any.dtype() == x_any.dtype() &&
              input_any.dtype() == x_any.dtype(),
          "rg_lru_step: the gates must have the shape and dtype of x");
  require(log_lambda.dim() == 1 && log_lambda.size(0) == x_any.size(1), "rg_lru_step: log_lambda must be (D,)");
  require(c > 0, "rg_lru_step: c must be positive");
  const Tensor x = last_contiguous(x_any), recurrence = last_contiguous(recurrence_any);
  const Tensor input = last_contiguous(input_any), rate = rates(x, log_lambda, c);
  Tensor h = empty_like(x);
  Tensor new_state;
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    using W = Wide<T>;
    const Tensor state = cast(state_any, dtype_of<W>());
    new_state = empty_like(state);
    const int64_t width = x.size(1);
    const W* rate_data = rate.data<W>();
    const T *x_data = x.data<T>(), *r_data = recurrence.data<T>(), *i_data = input.data<T>();
    const W* state_data = state.data<W>();
    W* new_data = new_state.mutable_data<W>();
    T* h_data = h.mutable_data<T>();
    parallel_for(x.size(0), grain_rows(width * RgLru::kOperations), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* in[3] = {x_data + row * x.stride(0), r_data + row * recurrence.stride(0),
                          i_data + row * input.stride(0)};
        const int64_t own = row * width;
        sweep<V>(width, [=](int64_t i, auto lanes) {
          V values[3], kept[RgLru::kKept], a, v;
          for (int k = 0; k < 3; ++k) values[k] = V::load(in[k] + i, lanes);
          RgLru::terms(values, V::load(rate_data + i, lanes), a, v, kept);
          const V value = fma(a, V::load(state_data + own + i, lanes), v);
          value.store(new_data + own + i, lanes);
          value.store(h_data + own + i, lanes);
        });
      }
    });
  });
  return {std::move(h), std::move(new_state)};
}

STAR_OPERATOR(
    "rg_lru(Tensor x, Tensor recurrence_gate, Tensor input_gate, Tensor log_lambda, float c, Tensor? initial_state,"
    " Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor)",
    rg_lru);
STAR_OPERATOR(
    "rg_lru_backward(Tensor? dh, Tensor? dfinal_state, Tensor x, Tensor recurrence_gate, Tensor input_gate,"
    " Tensor log_lambda, float c, Tensor? initial_state, Tensor? cu_seqlens, Tensor kept)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    rg_lru_backward);
STAR_OPERATOR(
    "rg_lru_step(Tensor state, Tensor x, Tensor recurrence_gate, Tensor input_gate, Tensor log_lambda, float c)"
    " -> (Tensor, Tensor)",
    rg_lru_step);

}  // namespace
}  // namespace star
