// Channel mixing with a diagonal, y = w x, or block-diagonal matrix, y_g = W_g x_g for each group, in one pass.
#include "native/star.h"

namespace star {
namespace {

float to_wide(float x) { return x; }
float to_wide(bf16 x) { return to_float(x); }
double to_wide(double x) { return x; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- diagonal ----

Tensor scale_channels(const Tensor& x_any, const Tensor& weight_any) {
  require(x_any.dim() >= 1 && weight_any.dim() == 1 && weight_any.size(0) == x_any.size(-1),
          "channel_mix: a diagonal weight must be (D,) for x (..., D)");
  const Tensor x = last_contiguous(x_any);
  Tensor y = empty_like(x);
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    const Tensor weight = cast(weight_any, dtype_of<Wide<T>>());
    const Wide<T>* w = weight.data<Wide<T>>();
    const T* in = x.data<T>();
    T* out = y.mutable_data<T>();
    const int64_t width = x.size(-1);
    const Rows rows(x);
    const bool stream = stream_rows(y, 2);
    parallel_for(rows.count(), grain_rows(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = in + rows.offset(r);
        T* to = out + r * width;
        sweep<V>(width, [=](int64_t i, auto lanes) {
          put(V::load(from + i, lanes) * V::load(w + i, lanes), to + i, lanes, stream);
        });
      }
      finish_streaming(stream);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> scale_channels_backward(const Tensor& dy_any, const Tensor& x_any,
                                                   const Tensor& weight_any) {
  require(x_any.dim() >= 1 && weight_any.dim() == 1 && weight_any.size(0) == x_any.size(-1) &&
              dy_any.same_shape(x_any) && dy_any.dtype() == x_any.dtype(),
          "channel_mix: dy must have the shape and dtype of x (..., D), a diagonal weight (D,)");
  const Tensor dy = last_contiguous(dy_any), x = last_contiguous(x_any);
  Tensor dx = empty_like(x), dweight;
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    constexpr DType kWide = dtype_of<Wide<T>>();
    const Tensor weight = cast(weight_any, kWide);
    const Wide<T>* w = weight.data<Wide<T>>();
    const int64_t width = x.size(-1);
    const Rows x_rows(x), dy_rows(dy);
    const RowChunks chunks(x_rows.count(), 2 * grain_rows(width));
    Tensor partial = zeros({chunks.count, width}, kWide), sum = empty({width}, kWide);
    const T *x_data = x.data<T>(), *dy_data = dy.data<T>();
    T* dx_data = dx.mutable_data<T>();
    auto* partial_data = partial.mutable_data<Wide<T>>();
    const bool stream = stream_rows(dx, 3);
    parallel_for(chunks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        Wide<T>* dw = partial_data + chunk * width;
        for (int64_t r = chunks.begin(chunk); r < chunks.begin(chunk + 1); ++r) {
          const T *in = x_data + x_rows.offset(r), *grad = dy_data + dy_rows.offset(r);
          T* out = dx_data + r * width;
          sweep<V>(width, [=](int64_t i, auto lanes) {
            const V g = V::load(grad + i, lanes);
            put(g * V::load(w + i, lanes), out + i, lanes, stream);
            fma(g, V::load(in + i, lanes), V::load(dw + i, lanes)).store(dw + i, lanes);
          });
        }
      }
      finish_streaming(stream);
    });
    add_chunks<V>(partial_data, chunks.count, width, sum.mutable_data<Wide<T>>());
    dweight = cast(sum, weight_any.dtype());
  });
  return {std::move(dx), std::move(dweight)};
}

// ---- block-diagonal ----

// Rows of x that one multiply takes: packing a group's matrix then costs 1/256 of it.
constexpr int64_t kMixRows = 256;

struct Groups {
  int64_t rows, count, size, width;
  Groups(const Tensor& x, const Tensor& weight) {
    require(x.dim() >= 1 && weight.dim() == 3 && weight.size(1) == weight.size(2) &&
                weight.size(0) * weight.size(1) == x.size(-1),
            "channel_mix: a grouped weight must be (G, D/G, D/G) for x (..., D)");
    count = weight.size(0);
    size = weight.size(1);
    width = x.size(-1);
    rows = 1;
    for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) rows *= x.size(axis);
  }
};

// out_g = in_g M_g over all rows, M_g (size x size) with the given strides.
template <class T>
void mix_groups(const Groups& groups, const T* in, const Wide<T>* matrices, int64_t row, int64_t column, T* out) {
  using V = Vec<T>;
  using W = Wide<T>;
  const int64_t blocks = (groups.rows + kMixRows - 1) / kMixRows, size = groups.size, width = groups.width;
  const int64_t cost = smaller(groups.rows, kMixRows) * size * size / 4;
  parallel_for(blocks * groups.count, grain_rows(cost), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / groups.count * kMixRows, g = task % groups.count;
      const int64_t count = smaller(kMixRows, groups.rows - first), offset = first * width + g * size;
      const Matrix<W> matrix{matrices + g * size * size, row, column};
      if constexpr (sizeof(T) == sizeof(W)) {
        gemm<T, W>(count, size, size, {in + offset, width, 1}, matrix, out + offset, width, false);
      } else {
        Scratch scratch;
        W* mixed = scratch.get<W>(count * size);
        gemm<T, W>(count, size, size, {in + offset, width, 1}, matrix, mixed, size, false);
        for (int64_t r = 0; r < count; ++r) {
          sweep<V>(size, [=](int64_t i, auto lanes) {
            V::load(mixed + r * size + i, lanes).store(out + offset + r * width + i, lanes);
          });
        }
      }
    }
  });
}

// Up to kFewRows rows, as in decoding, where packing a matrix would cost more than the multiply: y = W x for one group,
// a vector of outputs at a time, by the same chain of multiply-adds as `gemm`. W's element may be narrower than the sums.
constexpr int kFewRows = 4;

template <class T, class TW>
void mix_few(int64_t rows, int64_t size, int64_t width, const T* in, const TW* matrix, T* out) {
  using V = Vec<T>;
  sweep<V>(size, [&](int64_t n, auto lanes) {
    V sums[kFewRows] = {V(0), V(0), V(0), V(0)};
    const int64_t outputs = size - n < V::N ? size - n : V::N;
    sweep<V>(size, [&](int64_t k, auto inner) {
      V block[V::N];
      STAR_UNROLL for (int j = 0; j < V::N; ++j) {
        block[j] = j < outputs ? V::load(matrix + (n + j) * size + k, inner) : V(0);
      }
      transpose(block);
      const int64_t depth = size - k < V::N ? size - k : V::N;
      for (int64_t r = 0; r < rows; ++r) {
        V sum = sums[r];
        for (int64_t j = 0; j < depth; ++j) {
          sum = fma(V(to_wide(in[r * width + k + j])), block[j], sum);
        }
        sums[r] = sum;
      }
    });
    for (int64_t r = 0; r < rows; ++r) sums[r].store(out + r * width + n, lanes);
  });
}

template <class T, class TW>
void mix_few_groups(const Groups& groups, const T* in, const TW* matrices, T* out) {
  const int64_t size = groups.size;
  parallel_for(groups.count, grain_rows(size * size), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      mix_few<T, TW>(groups.rows, size, groups.width, in + g * size, matrices + g * size * size, out + g * size);
    }
  });
}

Tensor mix_in_groups(const Tensor& x_any, const Tensor& weight_any) {
  const Groups groups(x_any, weight_any);
  const Tensor x = contiguous(x_any);
  Tensor y = empty_like(x);
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    if (groups.rows <= kFewRows && weight_any.dtype() == x.dtype()) {
      const Tensor weight = contiguous(weight_any);
      return mix_few_groups<T, T>(groups, x.data<T>(), weight.data<T>(), y.mutable_data<T>());
    }
    const Tensor weight = cast(weight_any, dtype_of<Wide<T>>());
    if (groups.rows <= kFewRows) {
      return mix_few_groups<T, Wide<T>>(groups, x.data<T>(), weight.data<Wide<T>>(), y.mutable_data<T>());
    }
    mix_groups<T>(groups, x.data<T>(), weight.data<Wide<T>>(), 1, groups.size, y.mutable_data<T>());
  });
  return y;
}

// dW_g = sum over rows of dy_g^T x_g. Tasks are blocks of dW's rows and, where dW is small, chunks of the sum.
template <class T>
void matrix_gradients(const Groups& groups, const T* dy, const T* x, Wide<T>* dweight) {
  using W = Wide<T>;
  constexpr int64_t kBlock = 64;
  const int64_t size = groups.size, width = groups.width, numbers = groups.count * size * size;
  const int64_t affordable = (int64_t{1} << 20) / (numbers > 0 ? numbers : 1);
  const RowChunks chunks(groups.rows, affordable > 1 ? 512 : groups.rows);
  Tensor partial = empty({chunks.count > 1 ? chunks.count : 0, numbers}, dtype_of<W>());
  W* sums = chunks.count > 1 ? partial.mutable_data<W>() : dweight;
  const int64_t blocks = (size + kBlock - 1) / kBlock, tasks = chunks.count * groups.count * blocks;
  parallel_for(tasks, grain_rows(groups.rows / chunks.count * smaller(size, kBlock) * size / 4),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t first = task % blocks * kBlock, g = task / blocks % groups.count;
                   const int64_t chunk = task / blocks / groups.count, row = chunks.begin(chunk);
                   const int64_t offset = row * width + g * size;
                   gemm<T, T>(smaller(kBlock, size - first), size, chunks.begin(chunk + 1) - row,
                              {dy + offset + first, 1, width}, {x + offset, width, 1},
                              sums + chunk * numbers + (g * size + first) * size, size, false);
                 }
               });
  if (chunks.count > 1) add_chunks<Vec<T>>(sums, chunks.count, numbers, dweight);
}

std::tuple<Tensor, Tensor> mix_in_groups_backward(const Tensor& dy_any, const Tensor& x_any,
                                                  const Tensor& weight_any) {
  const Groups groups(x_any, weight_any);
  require(dy_any.same_shape(x_any) && dy_any.dtype() == x_any.dtype(),
          "channel_mix: dy must have the shape and dtype of x");
  const Tensor dy = contiguous(dy_any), x = contiguous(x_any);
  Tensor dx = empty_like(x), dweight;
  dispatch_dtype(x.dtype(), [&](auto element) {
    using T = decltype(element);
    constexpr DType kWide = dtype_of<Wide<T>>();
    const Tensor weight = cast(weight_any, kWide);
    Tensor sum = empty({groups.count, groups.size, groups.size}, kWide);
    mix_groups<T>(groups, dy.data<T>(), weight.data<Wide<T>>(), groups.size, 1, dx.mutable_data<T>());
    matrix_gradients<T>(groups, dy.data<T>(), x.data<T>(), sum.mutable_data<Wide<T>>());
    dweight = cast(sum, weight_any.dtype());
  });
  return {std::move(dx), std::move(dweight)};
}

STAR_OPERATOR("scale_channels(Tensor x, Tensor weight) -> Tensor", scale_channels);
STAR_OPERATOR("scale_channels_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)",
              scale_channels_backward);
STAR_OPERATOR("mix_in_groups(Tensor x, Tensor weight) -> Tensor", mix_in_groups);
STAR_OPERATOR("mix_in_groups_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)", mix_in_groups_backward);

}  // namespace
}  // namespace star
