// SwiGLU, GEGLU and ReGLU: y = act(gate) * up in one pass; the backward recomputes the activation.
#include "native/star.h"

namespace star {
namespace {

// Each activation gives its value and its derivative; the derivative's common terms with the value are the compiler's
// to share.
struct Silu {
  template <class V> static V value(V x) { return silu(x); }
  template <class V> static V value_and_slope(V x, V& slope) {
    const V s = sigmoid(x);
    slope = s * fma(x, V(1) - s, V(1));
    return x * s;
  }
};
struct Gelu {
  template <class V> static V value(V x) {
    V density;
    return x * normal_cdf(x, density);
  }
  template <class V> static V value_and_slope(V x, V& slope) {
    V density;
    const V cdf = normal_cdf(x, density);
    slope = fma(x, density, cdf);
    return x * cdf;
  }
};
struct Relu {
  template <class V> static V value(V x) { return max(V(0), x); }  // NaN passes: it is the second operand
  template <class V> static V value_and_slope(V x, V& slope) {
    slope = select(x > V(0), V(1), V(0));
    return value(x);
  }
};

void check_pair(const Tensor& gate, const Tensor& up) {
  require(gate.same_shape(up) && gate.dtype() == up.dtype(), "gated unit: up must have the shape and dtype of gate");
}

template <class Activation> Tensor gated_unit(const Tensor& gate_any, const Tensor& up_any) {
  check_pair(gate_any, up_any);
  const Tensor gate = last_contiguous(gate_any), up = last_contiguous(up_any);
  Tensor y = empty_like(gate);
  dispatch_dtype(gate.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    const T *gate_data = gate.data<T>(), *up_data = up.data<T>();
    T* y_data = y.mutable_data<T>();
    const bool large = worth_streaming(3 * y.numel() * y.element_size());
    parallel_runs({&gate, &up}, [=](const int64_t* offsets, int64_t out, int64_t count) {
      const T *g = gate_data + offsets[0], *u = up_data + offsets[1];
      T* o = y_data + out;
      const bool stream = large && on_line(o);
      sweep<V>(count, [=](int64_t i, auto lanes) {
        put(Activation::value(V::load(g + i, lanes)) * V::load(u + i, lanes), o + i, lanes, stream);
      });
      finish_streaming(stream);
    });
  });
  return y;
}

template <class Activation>
std::tuple<Tensor, Tensor> gated_unit_backward(const Tensor& dy_any, const Tensor& gate_any, const Tensor& up_any) {
  check_pair(gate_any, up_any);
  check_pair(gate_any, dy_any);
  const Tensor dy = last_contiguous(dy_any), gate = last_contiguous(gate_any), up = last_contiguous(up_any);
  Tensor dgate = empty_like(gate), dup = empty_like(gate);
  dispatch_dtype(gate.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    const T *dy_data = dy.data<T>(), *gate_data = gate.data<T>(), *up_data = up.data<T>();
    T *dgate_data = dgate.mutable_data<T>(), *dup_data = dup.mutable_data<T>();
    const bool large = worth_streaming(5 * dgate.numel() * dgate.element_size());
    parallel_runs({&dy, &gate, &up}, [=](const int64_t* offsets, int64_t out, int64_t count) {
      const T *d = dy_data + offsets[0], *g = gate_data + offsets[1], *u = up_data + offsets[2];
      T *dg = dgate_data + out, *du = dup_data + out;
      const bool stream = large && on_line(dg) && on_line(du);
      sweep<V>(count, [=](int64_t i, auto lanes) {
        const V grad = V::load(d + i, lanes);
        V slope;
        const V value = Activation::value_and_slope(V::load(g + i, lanes), slope);
        put(grad * V::load(u + i, lanes) * slope, dg + i, lanes, stream);
        put(grad * value, du + i, lanes, stream);
      });
      finish_streaming(stream);
    });
  });
  return {std::move(dgate), std::move(dup)};
}

STAR_OPERATOR("swiglu(Tensor gate, Tensor up) -> Tensor", gated_unit<Silu>);
STAR_OPERATOR("geglu(Tensor gate, Tensor up) -> Tensor", gated_unit<Gelu>);
STAR_OPERATOR("reglu(Tensor gate, Tensor up) -> Tensor", gated_unit<Relu>);
STAR_OPERATOR("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", gated_unit_backward<Silu>);
STAR_OPERATOR("geglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", gated_unit_backward<Gelu>);
STAR_OPERATOR("reglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", gated_unit_backward<Relu>);

}  // namespace
}  // namespace star
