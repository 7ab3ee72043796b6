// Causal convolution of V::N channels at once through a Fourier transform whose lanes are the channels.
//
// Two real sequences of at most n tokens are multiplied as polynomials in z modulo z^n - i. There, z^n = i puts what
// runs past the end into the imaginary part, so that the real part of coefficient t < n is the causal convolution: a
// complex transform of length n stands for a real one of length 2 n, with no step that takes the halves apart. (The
// right-angle convolution of Crandall and Fagin, "Discrete Weighted Transforms", 1994.)
//
// z^n - i is split into its n linear factors by a tree: z^(4m) - a has the factors z^m - w i^j with w^4 = a, so a node
// needs one w for all its m butterflies. The forward transform walks down the tree and leaves the values in tree order,
// the products do not mind, and the inverse walks back up. It goes depth first: what fits a cache is finished there.
#pragma once

#include <cmath>
#include <mutex>
#include <vector>

#include "native/star.h"

namespace star::long_convolution {

// n = branches * 4^levels; the branches are split off first, where the numbers are still real.
struct TransformSize {
  int branches;
  int levels;
  int64_t size() const { return int64_t{branches} << (2 * levels); }
};

// The smallest size that holds `length` tokens: 16, 32, 48, 64, 96, 128, 192, ...
inline TransformSize transform_size(int64_t length) {
  int levels = 2;
  while ((int64_t{4} << (2 * levels)) < length) ++levels;
  // Now length <= 4^(levels + 1), and 4^levels < length or levels == 2.
  const int64_t unit = int64_t{1} << (2 * levels);
  if (length <= unit) return {1, levels};
  if (2 * length <= 3 * unit && levels > 2) return {6, levels - 1};
  if (length <= 2 * unit) return {2, levels};
  if (length <= 3 * unit) return {3, levels};
  return {1, levels + 1};
}

// The roots: for each node of each level w, w^2 and w^3; and the branches' roots of i and their powers.
template <class S> struct Roots {
  static constexpr int kPerNode = 6;
  TransformSize size;
  std::vector<std::vector<S>> nodes;  // [level][node * kPerNode]
  std::vector<S> branch;              // [branch][power][re, im]

  const S* node(int level, int64_t index) const { return nodes[static_cast<size_t>(level)].data() + index * kPerNode; }

  explicit Roots(TransformSize of) : size(of) {
    constexpr double kTurn = 6.283185307179586477;
    // Angles in turns: of the modulus at each node, z^(4m) = exp(i angle).
    std::vector<double> angles;
    for (int b = 0; b < size.branches; ++b) {
      const double angle = (0.25 + b) / size.branches;
      angles.push_back(angle);
      for (int j = 0; j < size.branches; ++j) {
        branch.push_back(static_cast<S>(std::cos(kTurn * std::fmod(angle * j, 1.0))));
        branch.push_back(static_cast<S>(std::sin(kTurn * std::fmod(angle * j, 1.0))));
      }
    }
    for (int level = 0; level < size.levels; ++level) {
      std::vector<S> own;
      std::vector<double> children;
      own.reserve(angles.size() * kPerNode);
      children.reserve(angles.size() * 4);
      for (const double angle : angles) {
        for (int k = 1; k <= 3; ++k) {
          own.push_back(static_cast<S>(std::cos(kTurn * angle * k / 4)));
          own.push_back(static_cast<S>(std::sin(kTurn * angle * k / 4)));
        }
        for (const double quarter : {0.0, 0.5, 0.25, 0.75}) children.push_back(angle / 4 + quarter);
      }
      nodes.push_back(std::move(own));
      angles = std::move(children);
    }
  }

  // The roots of a size, computed once.
  static const Roots& of(TransformSize size) {
    static std::mutex guard;
    static const Roots* known[7][32] = {};
    const std::lock_guard<std::mutex> lock(guard);
    const Roots*& slot = known[size.branches][size.levels];
    if (slot == nullptr) slot = new Roots(size);
    return *slot;
  }
};

// V::N complex numbers, stored as a vector of real and one of imaginary parts.
template <class V> struct Complex {
  V re, im;
  using S = typename V::Scalar;

  static Complex load(const S* p) { return {V::load(p), V::load(p + V::N)}; }
  void store(S* p) const {
    re.store(p);
    im.store(p + V::N);
  }
  static Complex all(const S* p) { return {V(p[0]), V(p[1])}; }
  friend Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
  friend Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
  friend Complex operator*(Complex a, Complex b) {
    return {fnma(a.im, b.im, a.re * b.re), fma(a.im, b.re, a.re * b.im)};
  }
  // a times the conjugate of b.
  friend Complex times_conjugate(Complex a, Complex b) {
    return {fma(a.im, b.im, a.re * b.re), fnma(a.re, b.im, a.im * b.re)};
  }
  Complex times_i() const { return {-im, re}; }
};

template <class V> class Transform {
 public:
  using S = typename V::Scalar;
  using C = Complex<V>;
  static constexpr int64_t kPoint = 2 * V::N;  // scalars that one point takes

  explicit Transform(int64_t length) : roots_(&Roots<S>::of(transform_size(length))) {}

  int64_t size() const { return roots_->size.size(); }

  // Both ways go in two steps, so that a caller with several spectra can take them through part by part while the part
  // is in the second-level cache: at 8192 tokens, where a spectrum fills that cache, this moves a third less memory.
  //
  //   begin_forward   from real coefficients a[t * V::N + lane], t < size, to the moduli of the parts of z
  //   forward_part    one part of z to values
  //   inverse_part    back, from z or, where a factor is given, from their product
  //   end_inverse     to the coefficients' real parts; z is not kept in any of these
  int64_t parts() const { return 4 * roots_->size.branches; }
  int64_t part_scalars() const { return size() / parts() * kPoint; }
  void begin_forward(const S* a, S* z) const {
    switch (roots_->size.branches) {
      case 1: return from_branches<1>(a, z);
      case 2: return from_branches<2>(a, z);
      case 3: return from_branches<3>(a, z);
      default: return from_branches<6>(a, z);
    }
  }
  void forward_part(S* z, int64_t part) const {
    forward_below(z + part * part_scalars(), size() / parts(), 1, part);
  }
  void inverse_part(S* z, const S* factor, int64_t part) const {
    const int64_t offset = part * part_scalars();
    inverse_below(z + offset, factor == nullptr ? nullptr : factor + offset, size() / parts(), 1, part);
  }
  void end_inverse(const S* z, S* a) const {
    switch (roots_->size.branches) {
      case 1: return to_branches<1>(z, a);
      case 2: return to_branches<2>(z, a);
      case 3: return to_branches<3>(z, a);
      default: return to_branches<6>(z, a);
    }
  }
  void forward(const S* a, S* z) const {
    begin_forward(a, z);
    for (int64_t part = 0; part < parts(); ++part) forward_part(z, part);
  }
  void inverse(S* z, S* a) const {
    for (int64_t part = 0; part < parts(); ++part) inverse_part(z, nullptr, part);
    end_inverse(z, a);
  }

 private:
  // From coefficients to values modulo the four factors, and back (times 4).
  static void split(C (&c)[4], const S* w) {
    c[1] = c[1] * C::all(w);
    c[2] = c[2] * C::all(w + 2);
    c[3] = c[3] * C::all(w + 4);
    split_scaled(c);
  }
  static void split_scaled(C (&c)[4]) {
    const C even = c[0] + c[2], odd = c[1] + c[3], even_turned = c[0] - c[2], odd_turned = (c[1] - c[3]).times_i();
    c[0] = even + odd;
    c[1] = even - odd;
    c[2] = even_turned + odd_turned;
    c[3] = even_turned - odd_turned;
  }
  static void join_scaled(C (&c)[4]) {
    const C even = c[0] + c[1], odd = c[0] - c[1], even_turned = c[2] + c[3], odd_turned = (c[2] - c[3]).times_i();
    c[0] = even + even_turned;
    c[2] = even - even_turned;
    c[1] = odd - odd_turned;
    c[3] = odd + odd_turned;
  }
  static void join(C (&c)[4], const S* w) {
    join_scaled(c);
    c[1] = times_conjugate(c[1], C::all(w));
    c[2] = times_conjugate(c[2], C::all(w + 2));
    c[3] = times_conjugate(c[3], C::all(w + 4));
  }

  static void split_node(S* z, int64_t quarter, const S* w) {
    for (int64_t i = 0; i < quarter; ++i, z += kPoint) {
      C c[4];
      STAR_UNROLL for (int k = 0; k < 4; ++k) c[k] = C::load(z + k * quarter * kPoint);
      split(c, w);
      STAR_UNROLL for (int k = 0; k < 4; ++k) c[k].store(z + k * quarter * kPoint);
    }
  }
  static void join_node(S* z, int64_t quarter, const S* w) {
    for (int64_t i = 0; i < quarter; ++i, z += kPoint) {
      C c[4];
      STAR_UNROLL for (int k = 0; k < 4; ++k) c[k] = C::load(z + k * quarter * kPoint);
      join(c, w);
      STAR_UNROLL for (int k = 0; k < 4; ++k) c[k].store(z + k * quarter * kPoint);
    }
  }
  static void join_leaf(S* z, const S* factor, const S* w) {
    C c[4];
    STAR_UNROLL for (int k = 0; k < 4; ++k) {
      c[k] = C::load(z + k * kPoint);
      if (factor != nullptr) c[k] = c[k] * C::load(factor + k * kPoint);
    }
    join(c, w);
    STAR_UNROLL for (int k = 0; k < 4; ++k) c[k].store(z + k * kPoint);
  }

  // The tree below a node of 4^n >= 4 points.
  void forward_below(S* z, int64_t points, int level, int64_t node) const {
    const int64_t quarter = points / 4;
    split_node(z, quarter, roots_->node(level, node));
    if (quarter == 1) return;
    for (int64_t child = 0; child < 4; ++child) {
      S* part = z + child * quarter * kPoint;
      if (quarter == 4) {
        split_node(part, 1, roots_->node(level + 1, 4 * node + child));
      } else {
        forward_below(part, quarter, level + 1, 4 * node + child);
      }
    }
  }
  void inverse_below(S* z, const S* factor, int64_t points, int level, int64_t node) const {
    const int64_t quarter = points / 4;
    if (quarter == 1) return join_leaf(z, factor, roots_->node(level, node));
    for (int64_t child = 0; child < 4; ++child) {
      const int64_t offset = child * quarter * kPoint;
      const S* own_factor = factor == nullptr ? nullptr : factor + offset;
      if (quarter == 4) {
        join_leaf(z + offset, own_factor, roots_->node(level + 1, 4 * node + child));
      } else {
        inverse_below(z + offset, own_factor, quarter, level + 1, 4 * node + child);
      }
    }
    join_node(z, quarter, roots_->node(level, node));
  }

  // The real input's first step: the branches and one level of four.
  template <int R> void from_branches(const S* a, S* z) const {
    const int64_t step = size() / (4 * R);
    const S* power = roots_->branch.data();
    for (int64_t i = 0; i < step; ++i) {
      V in[4 * R];
      STAR_UNROLL for (int k = 0; k < 4 * R; ++k) in[k] = V::load(a + (i + k * step) * V::N);
      for (int b = 0; b < R; ++b) {
        const S* w = roots_->node(0, b);
        C c[4];
        if constexpr (R == 1) {
          c[0] = {in[0], V(0)};
          STAR_UNROLL for (int k = 1; k < 4; ++k) c[k] = {in[k] * V(w[2 * k - 2]), in[k] * V(w[2 * k - 1])};
          split_scaled(c);
        } else {
          const S* own = power + b * 2 * R;
          STAR_UNROLL for (int k = 0; k < 4; ++k) {
            c[k] = {fma(V(own[2]), in[4 + k], in[k]), V(own[3]) * in[4 + k]};
            STAR_UNROLL for (int j = 2; j < R; ++j) {
              c[k].re = fma(V(own[2 * j]), in[4 * j + k], c[k].re);
              c[k].im = fma(V(own[2 * j + 1]), in[4 * j + k], c[k].im);
            }
          }
          split(c, w);
        }
        STAR_UNROLL for (int k = 0; k < 4; ++k) c[k].store(z + ((4 * b + k) * step + i) * kPoint);
      }
    }
  }

  template <int R> void to_branches(const S* z, S* a) const {
    const int64_t step = size() / (4 * R);
    const S* power = roots_->branch.data();
    const V scale(S(1) / static_cast<S>(size()));
    for (int64_t i = 0; i < step; ++i) {
      V out[4 * R];
      for (int b = 0; b < R; ++b) {
        const S *w = roots_->node(0, b), *own = power + b * 2 * R;
        C c[4];
        STAR_UNROLL for (int k = 0; k < 4; ++k) c[k] = C::load(z + ((4 * b + k) * step + i) * kPoint);
        join(c, w);
        STAR_UNROLL for (int k = 0; k < 4; ++k) {
          out[k] = b == 0 ? c[k].re : out[k] + c[k].re;
          STAR_UNROLL for (int j = 1; j < R; ++j) {
            const V before = b == 0 ? V(0) : out[4 * j + k];
            out[4 * j + k] = fma(V(own[2 * j]), c[k].re, fma(V(own[2 * j + 1]), c[k].im, before));
          }
        }
      }
      STAR_UNROLL for (int k = 0; k < 4 * R; ++k) (out[k] * scale).store(a + (i + k * step) * V::N);
    }
  }

  const Roots<S>* roots_;
};

}  // namespace star::long_convolution
