// One token of Mamba-1's selective scan. Lanes are states here: the state, A, B and C are read once, as they lie.
#include "recurrence/selective.h"

namespace star {
namespace {

constexpr int64_t kChannelsOfTask = 64;

template <class T> struct StepRow {
  using W = Wide<T>;
  const T *x, *dt, *z;     // (D,)
  const W *state, *B, *C;  // (D, N), (G, N)
  const W *A, *D, *bias;   // (D, N), (D,)
  W* new_state;
  T* y;
  int64_t group_width, states;
  bool softplus;
};

// Channels [first, first + channels), at most kChannelsOfTask.
template <class T> void step_channels(const StepRow<T>& row, int64_t first, int64_t channels) {
  using V = Vec<T>;
  using W = Wide<T>;
  Scratch scratch;
  W *step_size = scratch.get<W>(kChannelsOfTask), *driven = scratch.get<W>(kChannelsOfTask);
  W *products = scratch.get<W>(kChannelsOfTask * V::N), *inner = scratch.get<W>(kChannelsOfTask);
  sweep<V>(channels, [&](int64_t i, auto lanes) {
    V s = V::load(row.dt + first + i, lanes);
    if (row.bias != nullptr) s = s + V::load(row.bias + first + i, lanes);
    if (row.softplus) s = softplus(s);
    s.store(step_size + i, lanes);
    (s * V::load(row.x + first + i, lanes)).store(driven + i, lanes);
  });
  for (int64_t i = 0; i < channels; ++i) {
    const int64_t group = (first + i) / row.group_width * row.states, own = (first + i) * row.states;
    const V s(step_size[i]), u(driven[i]);
    V sum(W(0));
    sweep<V>(row.states, [&](int64_t n, auto lanes) {
      const V decay = exp(s * V::load(row.A + own + n, lanes));
      const V h = fma(decay, V::load(row.state + own + n, lanes), u * V::load(row.B + group + n, lanes));
      h.store(row.new_state + own + n, lanes);
      // Idle lanes hold 0, or NaN where an infinity met a 0: they are not summed.
      V product = h * V::load(row.C + group + n, lanes);
      if constexpr (!decltype(lanes)::kFull) {
        product = select(V::iota() < V(static_cast<W>(lanes.count)), product, V(W(0)));
      }
      sum = sum + product;
    });
    sum.store(products + i * V::N);
  }
  add_lanes<V>(products, channels, inner);
  sweep<V>(channels, [&](int64_t i, auto lanes) {
    V y = V::load(inner + i, lanes);
    if (row.D != nullptr) y = fma(V::load(row.D + first + i, lanes), V::load(row.x + first + i, lanes), y);
    if (row.z != nullptr) y = y * silu(V::load(row.z + first + i, lanes));
    y.store(row.y + first + i, lanes);
  });
}

std::tuple<Tensor, Tensor> selective_scan_step(const Tensor& state_any, const Tensor& x_any, const Tensor& dt_any,
                                               const Tensor& A_any, const Tensor& B_any, const Tensor& C_any,
                                               const OptionalTensor& D_any, const OptionalTensor& z_any,
                                               const OptionalTensor& bias_any, bool dt_softplus) {
  require(x_any.dim() == 2 && A_any.dim() == 2 && B_any.dim() == 3 && state_any.dim() == 3,
          "selective_scan_step: x must be (B, D), A (D, N), B (B, G, N), state (B, D, N)");
  const int64_t batch = x_any.size(0), width = x_any.size(1), states = A_any.size(1), groups = B_any.size(1);
  require(A_any.size(0) == width && B_any.size(0) == batch && B_any.size(2) == states && groups > 0 &&
              width % groups == 0 && C_any.same_shape(B_any) && state_any.size(0) == batch &&
              state_any.size(1) == width && state_any.size(2) == states,
          "selective_scan_step: the sizes of state, x, A, B and C do not fit together");
  require(dt_any.same_shape(x_any) && (!z_any || z_any.same_shape(x_any)),
          "selective_scan_step: dt and z must have the shape of x");
  require((!D_any || (D_any.dim() == 1 && D_any.size(0) == width)) &&
              (!bias_any || (bias_any.dim() == 1 && bias_any.size(0) == width)),
          "selective_scan_step: D and dt_bias must be (D,)");
  const DType wide = x_any.dtype() == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const bool mixed = dt_any.dtype() != x_any.dtype() || (z_any && z_any.dtype() != x_any.dtype());
  const DType activation = mixed ? wide : x_any.dtype();
  const Tensor x = cast(x_any, activation), dt = cast(dt_any, activation), state = cast(state_any, wide);
  const Tensor A = cast(A_any, wide), B = cast(B_any, wide), C = cast(C_any, wide);
  const Tensor z = z_any ? cast(z_any, activation) : Tensor(), D = D_any ? cast(D_any, wide) : Tensor();
  const Tensor bias = bias_any ? cast(bias_any, wide) : Tensor();
  Tensor y = empty_like(x), new_state = empty_like(state);
  dispatch_dtype(activation, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const int64_t parts = (width + kChannelsOfTask - 1) / kChannelsOfTask;
    const int64_t group_width = width / groups, state_size = width * states, group_size = groups * states;
    T* y_data = y.mutable_data<T>();
    W* new_data = new_state.mutable_data<W>();
    // An element of the state costs about four simple operations.
    parallel_for(batch * parts, grain_rows(4 * kChannelsOfTask * states), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / parts, first = task % parts * kChannelsOfTask;
        const StepRow<T> row{x.data<T>() + b * width,
                             dt.data<T>() + b * width,
                             z ? z.data<T>() + b * width : nullptr,
                             state.data<W>() + b * state_size,
                             B.data<W>() + b * group_size,
                             C.data<W>() + b * group_size,
                             A.data<W>(),
                             D ? D.data<W>() : nullptr,
                             bias ? bias.data<W>() : nullptr,
                             new_data + b * state_size,
                             y_data + b * width,
                             group_width,
                             states,
                             dt_softplus};
        step_channels(row, first, width - first < kChannelsOfTask ? width - first : kChannelsOfTask);
      }
    });
  });
  if (y.dtype() != x_any.dtype()) y = cast(y, x_any.dtype());
  return {std::move(y), std::move(new_state)};
}

STAR_OPERATOR(
    "selective_scan_step(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, bool dt_softplus) -> (Tensor, Tensor)",
    selective_scan_step);

}  // namespace
}  // namespace star
