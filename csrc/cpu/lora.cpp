// LoRA (Hu et al., 2021): s = x a^T, whose product with b is added by the base product (see branch.h), and the
// gradients of a and b.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "lora.cpp"
#include "each_isa.h"

namespace quantlib {

void lora_s(DType x_dtype, const void* x, int64_t m, int64_t k, DType a_dtype, const void* a, int64_t row,
            int64_t column, int64_t rank, float* s) {
  QUANTLIB_DISPATCH(lora_s)(x_dtype, x, m, k, a_dtype, a, row, column, rank, s);
}
void lora_da(DType dtype, const void* x, int64_t m, int64_t k, const float* ds, int64_t rank, float scaling,
             DType a_dtype, void* da) {
  QUANTLIB_DISPATCH(lora_da)(dtype, x, m, k, ds, rank, scaling, a_dtype, da);
}
void lora_dy(DType dtype, const void* dy, int64_t m, int64_t n, DType b_dtype, const void* b, int64_t rank, float* ds,
             const float* s, float scaling, void* db) {
  QUANTLIB_DISPATCH(lora_dy)(dtype, dy, m, n, b_dtype, b, rank, ds, s, scaling, db);
}
void add_branch_to(DType dtype, const Branch& branch, int64_t m, int64_t n, void* y) {
  if (branch.rank) QUANTLIB_DISPATCH(add_branch_to)(dtype, branch, m, n, y);
}
void add_dropped_branch(DType dtype, const Branch& branch, int64_t m, int64_t n, uint64_t seed, double p, void* y) {
  QUANTLIB_DISPATCH(add_dropped_branch)(dtype, branch, m, n, seed, p, y);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "branch.h"
#include "matmul.h"

constexpr int kTile = QUANTLIB_LEVEL >= 2 ? 4 : 2;

// s[r * rank + j] = x row r . a row j for R rows and J rows of a, in float32: sums of kChain vectors, which are summed.
template <int R, int J, class X, class A>
static void dots(const X* x, const A* a, int64_t k, int64_t rank, float* s) {
  constexpr int64_t kChain = 16;
  F32 total[R][J] = {}, sums[R][J];
  const auto step = [&](int64_t i, auto at) __attribute__((always_inline)) {
    F32 b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) b[j] = at(a + j * k + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F32 v = at(x + r * k + i);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sums[r][j] = fma(v, b[j], sums[r][j]);
    }
  };
  for (int64_t begin = 0; begin < k; begin += kChain * W) {
    const int64_t end = begin + kChain * W < k ? begin + kChain * W : k;
    __builtin_memset(sums, 0, sizeof(sums));
    int64_t i = begin;
    for (; i + W <= end; i += W) step(i, [](const auto* p) __attribute__((always_inline)) { return load(p); });
    if (i < end) step(i, [&](const auto* p) __attribute__((always_inline)) { return load_part(p, end - i); });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) total[r][j] += sums[r][j];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) s[r * rank + j] = sum(total[r][j]);
}

template <int R, class X, class A>
static void dots(const X* x, const A* a, int64_t k, int64_t rank, float* s) {
  int64_t j = 0;
  for (; j + kTile <= rank; j += kTile) dots<R, kTile>(x, a + j * k, k, rank, s + j);
  for (; j < rank; ++j) dots<R, 1>(x, a + j * k, k, rank, s + j);
}

template <class X, class A>
static void lora_s_typed(const void* x_, int64_t m, int64_t k, const A* a, int64_t rank, float* s) {
  const X* x = static_cast<const X*>(x_);
  parallel_for((m + kTile - 1) / kTile, 16384 / (k + 1) + 1, [&](int64_t first, int64_t last) {
    const int64_t end = last * kTile < m ? last * kTile : m;
    int64_t row = first * kTile;
    for (; row + kTile <= end; row += kTile) dots<kTile>(x + row * k, a, k, rank, s + row * rank);
    for (; row < end; ++row) dots<1>(x + row * k, a, k, rank, s + row * rank);
  });
}

// Rows of x or dy, as the weight of a product in which the branch's factors are few rows.
template <class X>
struct DenseRows {
  const X* x;
  int64_t k;

  template <class E>
  SIMD_INLINE_MEMBER void decode(int64_t row, int64_t begin, int64_t end, E* out) const {
    if (end - begin == kColumns)  // a panel's row: copied at a known size, without a call
      convert(x + row * k + begin, kColumns, out);
    else
      convert(x + row * k + begin, end - begin, out);
  }
  SIMD_INLINE_MEMBER void prefetch(int64_t row, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += 64 / int64_t(sizeof(X))) __builtin_prefetch(x + row * k + i, 0, 2);
  }
  SIMD_INLINE_MEMBER void prefetch_below(int64_t row, int64_t begin) const {
    __builtin_prefetch(x + (row + 32) * k + begin, 0, 2);
  }
};

// What rows of X are multiplied as, and how many of it a factor takes: two bfloat16 hold 16 of a float's 24 bits.
template <class X>
struct MultipliedAs {
  typedef float Element;
};
#if QUANTLIB_LEVEL == 3
template <>
struct MultipliedAs<bf16> {
  typedef bf16 Element;
};
#endif
SIMD_INLINE void term(float v, int64_t, float* out) { *out = v; }
SIMD_INLINE void term(float v, int64_t index, bf16* out) {
  narrow(v, out);
  if (index) narrow(magnitude(v) < kInf ? v - widen(*out) : 0, out);
}

template <class X, class A>
static void many_dots(const void* x, int64_t m, int64_t k, const A* a, int64_t row, int64_t column, int64_t rank,
                      float* s) {
  typedef typename MultipliedAs<X>::Element E;
  constexpr int64_t kTerms = __is_same(E, float) || __is_same(E, A) ? 1 : 2;
  const DenseRows<X> rows{static_cast<const X*>(x), k};
  multiply_panels<E>(
      rank * kTerms, m, k,
      [&](int64_t r, int64_t begin, int64_t length, E* out) {
        const A* from = a + r / kTerms * row + begin * column;
        for (int64_t i = 0; i < length; ++i) term(widen(from[i * column]), r % kTerms, out + i);
      },
      [&](int64_t, int64_t) { return RowPanels<DenseRows<X> >(rows); },
      [&](const auto&, const Tiling& tiling, const float* sums, int64_t first, int64_t count) {
        for (int64_t c = 0; c < count; ++c)
          for (int64_t r = 0; r < tiling.rows; ++r) {
            float& to = s[(first + c) * rank + (tiling.first + r) / kTerms];
            to = sums[r * kColumns + c] + ((tiling.first + r) % kTerms ? to : 0);
          }
      });
}

template <class A>
static void lora_s_of(DType x_dtype, const void* x, int64_t m, int64_t k, const void* a_, int64_t row, int64_t column,
                      int64_t rank, float* s) {
  constexpr int64_t kFewRows = 16;
  const A* a = static_cast<const A*>(a_);
  if (m > kFewRows) {
    QUANTLIB_BY_DTYPE(x_dtype, many_dots, x, m, k, a, row, column, rank, s);
    return;
  }
  const bool in_rows = column == 1 && row == k;
  const Scratch<A> turned(0, in_rows ? 0 : rank * k);
  for (int64_t i = 0; i < k && !in_rows; ++i)
    for (int64_t j = 0; j < rank; ++j) turned[j * k + i] = a[j * row + i * column];
  if (!in_rows) a = turned;
  QUANTLIB_BY_DTYPE(x_dtype, lora_s_typed, x, m, k, a, rank, s);
}

void lora_s(DType x_dtype, const void* x, int64_t m, int64_t k, DType a_dtype, const void* a, int64_t row,
            int64_t column, int64_t rank, float* s) {
  QUANTLIB_BY_DTYPE(a_dtype, lora_s_of, x_dtype, x, m, k, a, row, column, rank, s);
}

template <class Out>
static void store_scaled(const float* sums, int64_t count, float scaling, void* target, int64_t at, int64_t column) {
  Out* out = static_cast<Out*>(target) + at;
  for (int64_t i = 0; i < count; ++i) narrow(sums[i] * scaling, out + i * column);
}

// The gradient of a factor: out[j * row + i * column] = scaling * sum of s[m, j] x[m, i] over m.
struct Gradient {
  int64_t rank;
  float scaling;
  DType dtype;
  void* out;
  int64_t row, column;
};

// Sums a block of rows of x. The sums of several blocks are kept in `sums`, [rank, k], until the last has come.
template <class X>
static void outer(const X* x, int64_t m, int64_t k, const float* s, const Gradient& to, float* sums, bool first_block,
                  bool last_block) {
  typedef typename MultipliedAs<X>::Element E;
  const int64_t terms = __is_same(E, float) || to.dtype == DType::bf16 ? 1 : 2;
  const DenseRows<X> rows{x, k};
  multiply_panels<E>(
      to.rank * terms, k, m,
      [&](int64_t r, int64_t begin, int64_t length, E* out) {
        for (int64_t i = 0; i < length; ++i) term(s[(begin + i) * to.rank + r / terms], r % terms, out + i);
      },
      [&](int64_t, int64_t) { return ColumnPanels<DenseRows<X> >(rows); },
      [&](const auto&, const Tiling& tiling, float* products, int64_t first, int64_t count) {
        for (int64_t r = 0; r < tiling.rows; r += terms, products += terms * kColumns) {
          const int64_t j = (tiling.first + r) / terms;
          for (int64_t c = 0; c < count; ++c) {
            if (terms == 2) products[c] += products[kColumns + c];
            if (!first_block) products[c] += sums[j * k + first + c];
            if (!last_block) sums[j * k + first + c] = products[c];
          }
          const int64_t at = j * to.row + first * to.column;
          if (last_block) QUANTLIB_BY_DTYPE(to.dtype, store_scaled, products, count, to.scaling, to.out, at, to.column);
        }
      });
}

template <class X>
static void da_of(const void* x, int64_t m, int64_t k, const float* ds, const Gradient& da) {
  outer(static_cast<const X*>(x), m, k, ds, da, nullptr, true, true);
}

void lora_da(DType dtype, const void* x, int64_t m, int64_t k, const float* ds, int64_t rank, float scaling,
             DType a_dtype, void* da) {
  const Gradient gradient{rank, scaling, a_dtype, da, k, 1};
  QUANTLIB_BY_DTYPE(dtype, da_of, x, m, k, ds, gradient);
}

// Both gradients want all of dy, so it comes in blocks of rows that are still in the cache for the second: 7.0 ms
// instead of 7.6 (2048 rows of 14336).
template <class X>
static void dy_of(DType dtype, const void* dy_, int64_t m, int64_t n, DType b_dtype, const void* b, int64_t rank,
                  float* ds, const float* s, const Gradient& db) {
  constexpr int64_t kBlock = 2 << 20;
  const X* dy = static_cast<const X*>(dy_);
  const int64_t fitting = kBlock / (n * int64_t(sizeof(X)) + 1) / kStretch * kStretch;
  const int64_t rows = fitting > kStretch ? fitting : kStretch;
  const Scratch<float> sums(4, db.out && rows < m ? rank * n : 0);
  for (int64_t r = 0; r == 0 || r < m; r += rows) {
    const int64_t count = m - r < rows ? m - r : rows;
    if (ds) QUANTLIB_ISA::lora_s(dtype, dy + r * n, count, n, b_dtype, b, 1, rank, rank, ds + r * rank);
    if (db.out) outer(dy + r * n, count, n, s + r * rank, db, sums, r == 0, r + rows >= m);
  }
}

void lora_dy(DType dtype, const void* dy, int64_t m, int64_t n, DType b_dtype, const void* b, int64_t rank, float* ds,
             const float* s, float scaling, void* db) {
  const Gradient gradient{rank, scaling, b_dtype, db, 1, rank};
  QUANTLIB_BY_DTYPE(dtype, dy_of, dtype, dy, m, n, b_dtype, b, rank, ds, s, gradient);
}

template <class T>
static void add_to(const Branch& branch, int64_t m, int64_t n, void* y_) {
  constexpr int64_t kRows = 32, kWide = 128;
  T* const y = static_cast<T*>(y_);
  parallel_for((m + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
    alignas(64) float sums[kRows * kWide];
    for (int64_t r = first * kRows; r < m && r < last * kRows; r += kRows)
      for (int64_t c = 0; c < n; c += kWide) {
        const int64_t rows = m - r < kRows ? m - r : kRows, count = n - c < kWide ? n - c : kWide;
        for (int64_t i = 0; i < rows; ++i) convert(y + (r + i) * n + c, count, sums + i * kWide);
        add_branch(branch, sums, kWide, r, rows, c, count);
        for (int64_t i = 0; i < rows; ++i) convert(sums + i * kWide, count, y + (r + i) * n + c);
      }
  });
}

void add_branch_to(DType dtype, const Branch& branch, int64_t m, int64_t n, void* y) {
  QUANTLIB_BY_DTYPE(dtype, add_to, branch, m, n, y);
}

template <class T>
static void add_dropped(DType dtype, const Branch& branch, int64_t m, int64_t n, uint64_t seed, double p, void* y_) {
  constexpr int64_t kRows = 64;
  T* const y = static_cast<T*>(y_);
  const Scratch<T> dropped(1, m * n);
  parallel_for((n + W - 1) / W, 16384 / (W * (m + 1)) + 1, [&](int64_t first, int64_t last) {
    alignas(64) float sums[kRows * W];
    for (int64_t c = first * W; c < n && c < last * W; c += W)
      for (int64_t r = 0; r < m; r += kRows) {
        const int64_t rows = m - r < kRows ? m - r : kRows, count = n - c < W ? n - c : W;
        __builtin_memset(sums, 0, sizeof(sums));
        add_branch(branch, sums, W, r, rows, c, count);
        for (int64_t i = 0; i < rows; ++i) convert(sums + i * W, count, dropped + (r + i) * n + c);
      }
  });
  dropout(dtype, dropped, m * n, seed, p, dropped);
  parallel_for(m, 16384 / (n + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first * n; i < last * n; ++i) narrow(widen(y[i]) + widen(dropped[i]), y + i);
  });
}

void add_dropped_branch(DType dtype, const Branch& branch, int64_t m, int64_t n, uint64_t seed, double p, void* y) {
  QUANTLIB_BY_DTYPE(dtype, add_dropped, dtype, branch, m, n, seed, p, y);
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
