#include "gemm.h"

#include "operator.h"
#include "scratch.h"

namespace star {
namespace {

// The tile of C held in registers: kRows x (kVectors * N). AVX-512 and NEON have 32 registers, AVX2 16.
template <class V> constexpr int kRows = V::N == 8 ? 6 : (V::N == 1 ? 4 : 8);
constexpr int kVectors = 2;

// Blocks of k and n whose packed panels (256 x 512 floats, 512 KB) stay in the second-level cache, and rows of A
// between them.
constexpr int64_t kBlockK = 256;
constexpr int64_t kBlockN = 512;
constexpr int64_t kBlockM = 96;

// Multiply-adds for which one line is looked ahead: 64 x 64 x 64 of them ask for 80 KB.
constexpr int64_t kAheadWork = 200;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// C tile (R rows) = what it is added to + A (R x k, rows `a_row` and columns `a_k` apart) B (k x tile, rows `b_k`
// apart).
template <class V, int R, int kVecs, class L>
inline void multiply_tile(int64_t k, const typename V::Scalar* a, int64_t a_row, int64_t a_k,
                          const typename V::Scalar* b, int64_t b_k, typename V::Scalar* c, int64_t c_row, L last,
                          const Onto<typename V::Scalar>& onto) {
  V sum[R][kVecs];
  STAR_UNROLL for (int r = 0; r < R; ++r) {
    STAR_UNROLL for (int v = 0; v < kVecs; ++v) {
      if (onto.data == nullptr) {
        sum[r][v] = V(0);
      } else if (v < kVecs - 1) {
        sum[r][v] = V::load(onto.data + r * onto.row + v * V::N);
      } else {
        sum[r][v] = V::load(onto.data + r * onto.row + v * V::N, last);
      }
    }
  }
  if (onto.data != nullptr && onto.factors != nullptr) {
    STAR_UNROLL for (int r = 0; r < R; ++r) {
      const V factor(onto.factors[r * onto.step]);
      STAR_UNROLL for (int v = 0; v < kVecs; ++v) sum[r][v] = sum[r][v] * factor;
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    V row[kVecs];
    STAR_UNROLL for (int v = 0; v < kVecs - 1; ++v) row[v] = V::load(b + v * V::N);
    row[kVecs - 1] = V::load(b + (kVecs - 1) * V::N, last);
    STAR_UNROLL for (int r = 0; r < R; ++r) {
      const V value(a[r * a_row]);
      STAR_UNROLL for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(value, row[v], sum[r][v]);
    }
    a += a_k;
    b += b_k;
  }
  STAR_UNROLL for (int r = 0; r < R; ++r) {
    STAR_UNROLL for (int v = 0; v < kVecs - 1; ++v) sum[r][v].store(c + r * c_row + v * V::N);
    sum[r][kVecs - 1].store(c + r * c_row + (kVecs - 1) * V::N, last);
  }
}

// All rows of one panel of columns: full tiles, then 4, 2, 1 rows.
template <class V, int kVecs, class L>
void multiply_panel(int64_t m, int64_t k, const typename V::Scalar* a, int64_t a_row, int64_t a_k, int64_t a_step,
                    const typename V::Scalar* b, int64_t b_k, typename V::Scalar* c, int64_t c_row, L last,
                    Onto<typename V::Scalar> onto, Lookahead* ahead) {
  constexpr int R = kRows<V>;
  const auto touch = [&](int64_t rows) {
    if (ahead != nullptr) ahead->touch(1 + rows * kVecs * V::N * k / kAheadWork);
  };
  int64_t i = 0;
  // Two rows alone are four chains of sums, half of what the multipliers could take: 6 + 2 rows become 4 + 4. A packed
  // panel of A holds 6 rows, which tiles must not cross.
  const int64_t full = R == 6 && m > 6 && m % 6 == 2 && a_step == 6 * a_row ? m - 8 : m;
  for (; i + R <= full; i += R, a += a_step, onto.advance(R)) {
    multiply_tile<V, R, kVecs>(k, a, a_row, a_k, b, b_k, c + i * c_row, c_row, last, onto);
    touch(R);
  }
  if constexpr (R > 4) {
    for (; m - i >= 4; i += 4, a += 4 * a_row, onto.advance(4)) {
      multiply_tile<V, 4, kVecs>(k, a, a_row, a_k, b, b_k, c + i * c_row, c_row, last, onto);
      touch(4);
    }
  }
  if (m - i >= 2) {
    multiply_tile<V, 2, kVecs>(k, a, a_row, a_k, b, b_k, c + i * c_row, c_row, last, onto);
    i += 2, a += 2 * a_row, onto.advance(2);
  }
  if (m - i >= 1) multiply_tile<V, 1, kVecs>(k, a, a_row, a_k, b, b_k, c + i * c_row, c_row, last, onto);
}

// rows x columns of `in` to `out` with rows `out_row` apart and columns adjacent; columns past `columns` up to `padded`
// are zero.
template <class T>
void pack(Matrix<T> in, int64_t rows, int64_t columns, int64_t padded, Wide<T>* out, int64_t out_row) {
  using V = Vec<T>;
  if (in.column == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      sweep<V>(columns, [&](int64_t j, auto lanes) {
        V::load(in.data + i * in.row + j, lanes).store(out + i * out_row + j, lanes);
      });
    }
  } else if (in.row == 1) {
    // Rows are adjacent in memory: N x N blocks through registers.
    for (int64_t j = 0; j < columns; j += V::N) {
      const int64_t width = smaller(V::N, columns - j);
      sweep<V>(rows, [&](int64_t i, auto lanes) {
        V block[V::N];
        STAR_UNROLL for (int t = 0; t < V::N; ++t) {
          block[t] = t < width ? V::load(in.data + i + (j + t) * in.column, lanes) : V(0);
        }
        transpose(block);
        const int64_t height = smaller(V::N, rows - i);
        for (int t = 0; t < height; ++t) {
          if (width == V::N) {
            block[t].store(out + (i + t) * out_row + j);
          } else {
            block[t].store(out + (i + t) * out_row + j, Lanes{static_cast<int>(width)});
          }
        }
      });
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        V::load(in.data + i * in.row + j * in.column, Lanes{1}).store(out + i * out_row + j, Lanes{1});
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = columns; j < padded; ++j) out[i * out_row + j] = 0;
  }
}

}  // namespace

template <class TA, class TB>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<TA> a, Matrix<TB> b, Wide<TA>* c, int64_t c_row,
          Onto<Wide<TA>> onto, Lookahead* ahead) {
  using V = Vec<TA>;
  using W = Wide<TA>;
  constexpr int64_t kColumns = kVectors * V::N;
  constexpr int R = kRows<V>;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i) {
      const W factor = onto.factors != nullptr ? onto.factors[i * onto.step] : W(1);
      const W* from = onto.data != nullptr ? onto.data + i * onto.row : nullptr;
      for (int64_t j = 0; j < n; ++j) c[i * c_row + j] = from != nullptr ? factor * from[j] : 0;
    }
  }
  Scratch scratch;
  // B is read in place where its rows are adjacent and few enough reads follow; A where broadcasting from it is cheap.
  constexpr bool kWideA = sizeof(TA) == sizeof(W), kWideB = sizeof(TB) == sizeof(W);
  const bool pack_b = !kWideB || b.column != 1 || m > 4 * kBlockM;
  const bool pack_a = !kWideA || (a.column != 1 && a.row != 1) || n > kBlockN;
  W* b_panels = pack_b ? scratch.get<W>(kBlockK * (smaller(kBlockN, n) + kColumns)) : nullptr;
  W* a_panels = pack_a ? scratch.get<W>(kBlockK * (smaller(kBlockM, m) + R)) : nullptr;

  for (int64_t p = 0; p < k; p += kBlockK) {
    const int64_t depth = smaller(kBlockK, k - p);
    if (p > 0) onto = {c, c_row};
    for (int64_t j0 = 0; j0 < n; j0 += kBlockN) {
      const int64_t width = smaller(kBlockN, n - j0);
      if (pack_b) {
        for (int64_t j = 0; j < width; j += kColumns) {
          pack<TB>({b.data + p * b.row + (j0 + j) * b.column, b.row, b.column}, depth, smaller(kColumns, width - j),
                   kColumns, b_panels + j * depth, kColumns);
        }
      }
      for (int64_t i0 = 0; i0 < m; i0 += kBlockM) {
        const int64_t height = smaller(kBlockM, m - i0);
        const W* a_block;
        int64_t a_row, a_k, a_step;
        if (pack_a) {
          // R rows a panel, the R values of each k adjacent: the transpose of A's block, packed like B.
          for (int64_t i = 0; i < height; i += R) {
            pack<TA>({a.data + (i0 + i) * a.row + p * a.column, a.column, a.row}, depth, smaller(R, height - i), R,
                     a_panels + i * depth, R);
          }
          a_block = a_panels, a_row = 1, a_k = R, a_step = R * depth;
        } else {
          a_block = reinterpret_cast<const W*>(a.data) + i0 * a.row + p * a.column;
          a_row = a.row, a_k = a.column, a_step = R * a.row;
        }
        for (int64_t j = 0; j < width; j += kColumns) {
          const W* b_panel = pack_b ? b_panels + j * depth : reinterpret_cast<const W*>(b.data) + p * b.row + j0 + j;
          const int64_t b_k = pack_b ? kColumns : b.row;
          W* out = c + i0 * c_row + j0 + j;
          Onto<W> add = onto;
          add.advance(i0, j0 + j);
          const int64_t columns = smaller(kColumns, width - j);
          const int rest = static_cast<int>(columns % V::N);
          if (columns == kColumns) {
            multiply_panel<V, 2>(height, depth, a_block, a_row, a_k, a_step, b_panel, b_k, out, c_row, Full{}, add,
                                 ahead);
          } else if (columns == V::N) {
            multiply_panel<V, 1>(height, depth, a_block, a_row, a_k, a_step, b_panel, b_k, out, c_row, Full{}, add,
                                 ahead);
          } else if (columns < V::N) {
            multiply_panel<V, 1>(height, depth, a_block, a_row, a_k, a_step, b_panel, b_k, out, c_row, Lanes{rest},
                                 add, ahead);
          } else {
            multiply_panel<V, 2>(height, depth, a_block, a_row, a_k, a_step, b_panel, b_k, out, c_row, Lanes{rest},
                                 add, ahead);
          }
        }
      }
    }
  }
}

#define STAR_GEMM(TA, TB)                                                                                 \
  template void gemm<TA, TB>(int64_t, int64_t, int64_t, Matrix<TA>, Matrix<TB>, Wide<TA>*, int64_t c_row, \
                             Onto<Wide<TA>>, Lookahead*);
STAR_GEMM(float, float)
STAR_GEMM(bf16, bf16)
STAR_GEMM(float, bf16)
STAR_GEMM(bf16, float)
STAR_GEMM(double, double)

}  // namespace star

// C (m x n, contiguous) = or += A B with element strides for A and B; for tests and benchmarks.
STAR_EXPORT void star_probe_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_column,
                                 const float* b, int64_t b_row, int64_t b_column, float* c, bool accumulate) {
  star::gemm<float, float>(m, n, k, {a, a_row, a_column}, {b, b_row, b_column}, c, n, accumulate);
}

STAR_EXPORT void star_probe_gemm_bf16(int64_t m, int64_t n, int64_t k, const star::bf16* a, int64_t a_row,
                                      int64_t a_column, const star::bf16* b, int64_t b_row, int64_t b_column, float* c,
                                      bool accumulate) {
  star::gemm<star::bf16, star::bf16>(m, n, k, {a, a_row, a_column}, {b, b_row, b_column}, c, n, accumulate);
}
