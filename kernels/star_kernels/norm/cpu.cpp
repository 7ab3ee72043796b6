// RMS normalisation: y = x r w with r = 1 / sqrt(mean(x^2) + eps), one row at a time; the backward recomputes r.
#include "native/star.h"

namespace star {
namespace {

template <class T> Wide<T> inverse_rms(const T* x, int64_t width, Wide<T> eps) {
  using V = Vec<T>;
  const Wide<T> squares = sum_row<V>(width, [=](int64_t i, auto lanes, V sum) {
    const V value = V::load(x + i, lanes);
    return fma(value, value, sum);
  });
  return 1 / std::sqrt(squares / static_cast<Wide<T>>(width) + eps);
}

void check_norm(const Tensor& x, const Tensor& weight) {
  require(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1),
          "rms_norm: weight must be (D,) for x (..., D)");
}

Tensor rms_norm(const Tensor& x_any, const Tensor& weight_any, double eps) {
  check_norm(x_any, weight_any);
  const Tensor x = last_contiguous(x_any);
  Tensor y = empty_like(x);
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    const Tensor weight = cast(weight_any, dtype_of<Wide<T>>());
    const Wide<T>* w = weight.data<Wide<T>>();
    const T* x_data = x.data<T>();
    T* y_data = y.mutable_data<T>();
    const int64_t width = x.size(-1);
    const Rows rows(x);
    parallel_for(rows.count(), grain_rows(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* in = x_data + rows.offset(r);
        T* out = y_data + r * width;
        const V scale(inverse_rms<T>(in, width, static_cast<Wide<T>>(eps)));
        sweep<V>(width, [=](int64_t i, auto lanes) {
          (V::load(in + i, lanes) * scale * V::load(w + i, lanes)).store(out + i, lanes);
        });
      }
    });
  });
  return y;
}

// With g = dy w: dx = r (g - x r^2 mean(g x)), dw = sum over rows of dy x r.
template <class T>
void rms_norm_backward_row(const T* dy, const T* x, const Wide<T>* w, int64_t width, Wide<T> eps, T* dx, Wide<T>* dw) {
  using V = Vec<T>;
  const Wide<T> r = inverse_rms<T>(x, width, eps);
  const Wide<T> product = sum_row<V>(width, [=](int64_t i, auto lanes, V sum) {
    return fma(V::load(dy + i, lanes) * V::load(w + i, lanes), V::load(x + i, lanes), sum);
  });
  const V scale(r), pull(product / static_cast<Wide<T>>(width) * r * r);
  sweep<V>(width, [=](int64_t i, auto lanes) {
    const V x_i = V::load(x + i, lanes), dy_i = V::load(dy + i, lanes);
    (scale * fnma(x_i, pull, dy_i * V::load(w + i, lanes))).store(dx + i, lanes);
    fma(dy_i, x_i * scale, V::load(dw + i, lanes)).store(dw + i, lanes);
  });
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                             double eps) {
  check_norm(x_any, weight_any);
  require(dy_any.same_shape(x_any) && dy_any.dtype() == x_any.dtype(),
          "rms_norm: dy must have the shape and dtype of x");
  const Tensor dy = last_contiguous(dy_any), x = last_contiguous(x_any);
  Tensor dx = empty_like(x);
  Tensor dweight;
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    constexpr DType kWide = dtype_of<Wide<T>>();
    const Tensor weight = cast(weight_any, kWide);
    const int64_t width = x.size(-1);
    const Rows rows(x), dy_rows(dy);
    const RowChunks chunks(rows.count(), 2 * grain_rows(width));
    Tensor partial = zeros({chunks.count, width}, kWide);
    Tensor sum = empty({width}, kWide);
    const T *x_data = x.data<T>(), *dy_data = dy.data<T>();
    T* dx_data = dx.mutable_data<T>();
    auto* partial_data = partial.mutable_data<Wide<T>>();
    parallel_for(chunks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        for (int64_t r = chunks.begin(chunk); r < chunks.begin(chunk + 1); ++r) {
          rms_norm_backward_row<T>(dy_data + dy_rows.offset(r), x_data + rows.offset(r), weight.data<Wide<T>>(), width,
                                   static_cast<Wide<T>>(eps), dx_data + r * width, partial_data + chunk * width);
        }
      }
    });
    add_chunks<Vec<T>>(partial_data, chunks.count, width, sum.mutable_data<Wide<T>>());
    dweight = cast(sum, weight_any.dtype());
  });
  return {std::move(dx), std::move(dweight)};
}

STAR_OPERATOR("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm);
STAR_OPERATOR("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
              rms_norm_backward);

}  // namespace
}  // namespace star
