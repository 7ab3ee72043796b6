// The arithmetic of the selective scan on one tile: V::N channels as lanes, kStates states in registers, up to
// kScanBlock tokens. Everything here is in the type that states are held in, laid out [token][lane] or [state][lane].
#pragma once

#include "recurrence/scan.h"

namespace star {

// 2^x; 0 below -150, infinite above 128. The decay exp(s A) is 2^(s A'), A' = A / ln 2: reducing the argument to
// [-1/2, 1/2] is then one exact subtraction.
template <class V> inline V exp2(V x) {
  if constexpr (V::N == 1) {
    return V(std::exp2(x.v));
  } else {
    // The bound is the first operand, so that NaN passes.
    x = min(V(130.0f), max(V(-160.0f), x));
    const V n = round_even(x), r = x - n;
    // 2^r = 1 + r q(r), relative error 2^-28.9 before rounding; minimax fit.
    V q(0.00015353362f);
    q = fma(q, r, V(0.0013398874f));
    q = fma(q, r, V(0.009618437f));
    q = fma(q, r, V(0.055503324f));
    q = fma(q, r, V(0.24022648f));
    q = fma(q, r, V(0.6931472f));
    return scale_by_power_of_2(fma(q, r, V(1.0f)), n);
  }
}

// Lines that will be wanted later, asked for one a token while there is arithmetic to do: rows are too far apart for
// the processor to see the pattern, and a burst of requests waits for memory (a tenth of the forward at D 1536).
struct Ahead {
  const char* line;
  int64_t step;  // bytes between tokens

  void next() {
    __builtin_prefetch(line);
    line += step;
  }
};

// One block of a tile, without the states: pointers to [token][lane], but B and C to [token][state] with a step between
// tokens.
template <class W> struct SelectiveBlock {
  int64_t tokens;
  const W *step_size, *driven;  // s and s x
  const W *B, *C;
  int64_t group_step;  // between tokens of B and C
  W* y;                // C . h, added to
  // Backward alone:
  const W* dy;     // gradient at y
  W* ddriven;      // at s x, added to
  W* dlog_decay;   // sum over states of A' times the gradient at s A, added to
  W *h, *a;        // [token][state of this pass][lane], temporary
  W *dB, *dC;        // [token][pass][kSumsOfPass], sums over tiles that add_sums finishes
  int64_t sum_step;  // between tokens of dB and dC
  bool first;        // dB and dC hold nothing yet
};

// Sums over channels are kept as one vector for a pass of up to four states: number 4 L + k holds a part of state k.
template <class V> constexpr int kSumsOfPass = V::N < 4 ? 4 : V::N;

template <int kStates, class V, class W = typename V::Scalar>
inline void add_products(const V (&products)[kStates], W* sums, bool first) {
  if constexpr (V::N < 4) {
    for (int k = 0; k < kStates; ++k) (first ? products[k] : products[k] + V::load(sums + k)).store(sums + k);
  } else {
    V all[4];
    STAR_UNROLL for (int k = 0; k < 4; ++k) all[k] = k < kStates ? products[k < kStates ? k : 0] : V(W(0));
    const V sum = sum_quarters(all[0], all[1], all[2], all[3]);
    (first ? sum : sum + V::load(sums)).store(sums);
  }
}

// The states' sums of one pass.
template <class V, class W = typename V::Scalar> inline void add_sums(const W* sums, int states, W* to) {
  for (int k = 0; k < states; ++k) {
    W sum = sums[k];
    for (int i = 4 + k; i < kSumsOfPass<V>; i += 4) sum += sums[i];
    to[k] = sum;
  }
}

// y += C . h over the block for kStates states from `state` number of B and C; h goes from before to after the block.
template <int kStates, class V, class W = typename V::Scalar>
void selective_forward_block(const SelectiveBlock<W>& block, int64_t state, const W* rates, W* h_data, Ahead ahead) {
  V h[kStates], rate[kStates];
  STAR_UNROLL for (int k = 0; k < kStates; ++k) {
    h[k] = V::load(h_data + k * V::N);
    rate[k] = V::load(rates + k * V::N);
  }
  const int64_t tokens = block.tokens, group_step = block.group_step;
  const W *B = block.B + state, *C = block.C + state, *s_data = block.step_size, *u_data = block.driven;
  W* y_data = block.y;
  for (int64_t t = 0; t < tokens; ++t) {
    ahead.next();
    const V s = V::load(s_data + t * V::N), u = V::load(u_data + t * V::N);
    V y = V::load(y_data + t * V::N);
    STAR_UNROLL for (int k = 0; k < kStates; ++k) {
      h[k] = fma(exp2(s * rate[k]), h[k], u * V(B[k]));
      y = fma(V(C[k]), h[k], y);
    }
    y.store(y_data + t * V::N);
    B += group_step;
    C += group_step;
  }
  STAR_UNROLL for (int k = 0; k < kStates; ++k) h[k].store(h_data + k * V::N);
}

// The block backwards, in pass number `pass`. `h_data`: the states before the block. `pull_data`: the gradient at the
// states after the block, which becomes that at those before it. `drates`: added to. With G the gradient at h_t:
//   dC += dy h_t,  G = C dy + pull,  dB += G u,  du += G B,  q = a G h_{t-1} = dL/d(s A),  pull = a G.
template <int kStates, class V, class W = typename V::Scalar>
void selective_backward_block(const SelectiveBlock<W>& block, int64_t pass, int64_t state, const W* rates,
                              const W* h_data, W* pull_data, W* drates, Ahead first_ahead, Ahead second_ahead) {
  V h[kStates], rate[kStates];
  STAR_UNROLL for (int k = 0; k < kStates; ++k) {
    h[k] = V::load(h_data + k * V::N);
    rate[k] = V::load(rates + k * V::N);
  }
  // Copies: the compiler must assume that a stored vector overwrites the members.
  const int64_t tokens = block.tokens, group_step = block.group_step, sum_step = block.sum_step;
  const W *B = block.B + state, *C = block.C + state, *s_data = block.step_size, *u_data = block.driven;
  const W* dy_data = block.dy;
  W *y_data = block.y, *saved_h = block.h, *saved_a = block.a;
  const bool first = block.first;
  W* sums = block.dC + pass * kSumsOfPass<V>;
  for (int64_t t = 0; t < tokens; ++t) {
    first_ahead.next();
    const V s = V::load(s_data + t * V::N), u = V::load(u_data + t * V::N), dy = V::load(dy_data + t * V::N);
    V y = V::load(y_data + t * V::N), products[kStates];
    STAR_UNROLL for (int k = 0; k < kStates; ++k) {
      const V a = exp2(s * rate[k]);
      h[k].store(saved_h + (t * kStates + k) * V::N);
      a.store(saved_a + (t * kStates + k) * V::N);
      h[k] = fma(a, h[k], u * V(B[k]));
      y = fma(V(C[k]), h[k], y);
      products[k] = dy * h[k];
    }
    y.store(y_data + t * V::N);
    add_products(products, sums, first);
    B += group_step;
    C += group_step;
    sums += sum_step;
  }
  V pull[kStates], drate[kStates];
  STAR_UNROLL for (int k = 0; k < kStates; ++k) {
    pull[k] = V::load(pull_data + k * V::N);
    drate[k] = V(W(0));
  }
  W *ddriven_data = block.ddriven, *dlog_data = block.dlog_decay;
  sums = block.dB + pass * kSumsOfPass<V> + tokens * sum_step;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    second_ahead.next();
    B -= group_step;
    C -= group_step;
    sums -= sum_step;
    const V s = V::load(s_data + t * V::N), u = V::load(u_data + t * V::N), dy = V::load(dy_data + t * V::N);
    V ddriven = V::load(ddriven_data + t * V::N), dlog_decay = V::load(dlog_data + t * V::N), products[kStates];
    STAR_UNROLL for (int k = 0; k < kStates; ++k) {
      const V g = fma(V(C[k]), dy, pull[k]);
      products[k] = g * u;
      ddriven = fma(V(B[k]), g, ddriven);
      pull[k] = g * V::load(saved_a + (t * kStates + k) * V::N);
      const V q = pull[k] * V::load(saved_h + (t * kStates + k) * V::N);
      dlog_decay = fma(q, rate[k], dlog_decay);
      drate[k] = fma(q, s, drate[k]);
    }
    ddriven.store(ddriven_data + t * V::N);
    dlog_decay.store(dlog_data + t * V::N);
    add_products(products, sums, first);
  }
  STAR_UNROLL for (int k = 0; k < kStates; ++k) {
    pull[k].store(pull_data + k * V::N);
    // A sum for each block, then one over blocks: errors grow with the root of 64 tokens, not of all.
    (drate[k] + V::load(drates + k * V::N)).store(drates + k * V::N);
  }
}

// body(pass, state, kStates) for the passes over `states` states, four in registers at a time.
template <class F> inline void over_states(int64_t states, F&& body) {
  int64_t n = 0, pass = 0;
  for (; n + 4 <= states; n += 4) body(pass++, n, std::integral_constant<int, 4>{});
  if (states - n >= 2) {
    body(pass++, n, std::integral_constant<int, 2>{});
    n += 2;
  }
  if (n < states) body(pass, n, std::integral_constant<int, 1>{});
}

inline int64_t num_passes(int64_t states) { return states / 4 + states % 4 / 2 + states % 2; }

// From rows (channels, states) to [state][lane], times `scale`; lanes from `channels` on are 0.
template <class V, class W = typename V::Scalar>
void to_lanes(const W* from, int64_t channels, int64_t states, W scale, W* to) {
  V rows[V::N];
  sweep<V>(states, [&](int64_t n, auto lanes) {
    for (int i = 0; i < V::N; ++i) rows[i] = i < channels ? V::load(from + i * states + n, lanes) : V(W(0));
    transpose(rows);
    for (int j = 0; j < V::N && n + j < states; ++j) (rows[j] * V(scale)).store(to + (n + j) * V::N);
  });
}

// Back from [state][lane] to rows (channels, states).
template <class V, class W = typename V::Scalar>
void from_lanes(const W* from, int64_t channels, int64_t states, W* to) {
  V rows[V::N];
  sweep<V>(states, [&](int64_t n, auto lanes) {
    for (int j = 0; j < V::N; ++j) rows[j] = n + j < states ? V::load(from + (n + j) * V::N) : V(W(0));
    transpose(rows);
    for (int i = 0; i < V::N && i < channels; ++i) rows[i].store(to + i * states + n, lanes);
  });
}

// to[i] = sum of the lanes of vector i; lanes are added in the same order for every i.
template <class V, class W = typename V::Scalar> void add_lanes(const W* from, int64_t count, W* to) {
  V rows[V::N];
  sweep<V>(count, [&](int64_t i, auto lanes) {
    for (int k = 0; k < V::N; ++k) rows[k] = i + k < count ? V::load(from + (i + k) * V::N) : V(W(0));
    lane_sums(rows).store(to + i, lanes);
  });
}

}  // namespace star
