// Plain C entry points to what the operators are made of, so that tests and benchmarks can reach it directly: vector
// math, conversions, and (gemm.cpp) the matrix multiply.
#include <cstring>

#include "math.h"
#include "operator.h"

using namespace star;

namespace {

template <class F> void map(const float* x, float* y, int64_t count, F&& function) {
  sweep<VecF>(count, [&](int64_t i, auto lanes) { function(VecF::load(x + i, lanes)).store(y + i, lanes); });
}

VecF density_of(VecF x) {
  VecF density;
  normal_cdf(x, density);
  return density;
}

VecF cdf_of(VecF x) {
  VecF density;
  return normal_cdf(x, density);
}

}  // namespace

// y[i] = function(x[i]) for a function of math.h by name; false if there is none of that name.
STAR_EXPORT bool star_probe_unary(const char* name, const float* x, float* y, int64_t count) {
  const auto is = [&](const char* candidate) { return std::strcmp(name, candidate) == 0; };
  if (is("exp"))
    map(x, y, count, [](VecF v) { return exp(v); });
  else if (is("expm1"))
    map(x, y, count, [](VecF v) { return expm1(v); });
  else if (is("log"))
    map(x, y, count, [](VecF v) { return log(v); });
  else if (is("log1p"))
    map(x, y, count, [](VecF v) { return log1p(v); });
  else if (is("sigmoid"))
    map(x, y, count, [](VecF v) { return sigmoid(v); });
  else if (is("softplus"))
    map(x, y, count, [](VecF v) { return softplus(v); });
  else if (is("tanh"))
    map(x, y, count, [](VecF v) { return tanh(v); });
  else if (is("silu"))
    map(x, y, count, [](VecF v) { return silu(v); });
  else if (is("normal_cdf"))
    map(x, y, count, cdf_of);
  else if (is("normal_density"))
    map(x, y, count, density_of);
  else
    return false;
  return true;
}

STAR_EXPORT void star_probe_to_bf16(const float* x, bf16* y, int64_t count) {
  sweep<VecF>(count, [&](int64_t i, auto lanes) { VecF::load(x + i, lanes).store(y + i, lanes); });
}

STAR_EXPORT void star_probe_from_bf16(const bf16* x, float* y, int64_t count) {
  sweep<VecF>(count, [&](int64_t i, auto lanes) { VecF::load(x + i, lanes).store(y + i, lanes); });
}

STAR_EXPORT float star_probe_sum(const float* x, int64_t count) {
  VecF sum(0.0f);
  sweep<VecF>(count, [&](int64_t i, auto lanes) { sum = sum + VecF::load(x + i, lanes); });
  return reduce_add(sum);
}

STAR_EXPORT float star_probe_max(const float* x, int64_t count) {
  VecF most(-__builtin_inff());
  sweep<VecF>(count, [&](int64_t i, auto lanes) {
    most = max(most, select(VecF::iota() < VecF(static_cast<float>(count - i)), VecF::load(x + i, lanes), most));
  });
  return reduce_max(most);
}
