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
#include "transpose.h"
#include "branch.h"
#include "tile.h"
#include "panels.h"
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

// Up to kTile rows of x and of a.
template <class X, class A>
static void tile_of_dots(int64_t rows, int64_t columns, const X* x, const A* a, int64_t k, int64_t rank, float* s) {
  if (rows < kTile)
    for (int64_t r = 0; r < rows; ++r)
      if (columns < kTile)
        for (int64_t j = 0; j < columns; ++j) dots<1, 1>(x + r * k, a + j * k, k, rank, s + r * rank + j);
      else
        dots<1, kTile>(x + r * k, a, k, rank, s + r * rank);
  else if (columns < kTile)
    for (int64_t j = 0; j < columns; ++j) dots<kTile, 1>(x, a + j * k, k, rank, s + j);
  else
    dots<kTile, kTile>(x, a, k, rank, s);
}

// Few rows of x: tiles of s are shared out, so that not one thread has all of a single row.
template <class X, class A>
static void few_dots(const void* x_, int64_t m, int64_t k, const A* a, int64_t rank, float* s) {
  const X* x = static_cast<const X*>(x_);
  const int64_t across = (rank + kTile - 1) / kTile, tiles = (m + kTile - 1) / kTile * across;
  parallel_for(tiles, 16384 / (k + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t r = tile / across * kTile, j = tile % across * kTile;
      tile_of_dots(m - r, rank - j, x + r * k, a + j * k, k, rank, s + r * rank + j);
    }
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

// Most rows for which no panels are made, measured.
constexpr int64_t kFewRows = QUANTLIB_LEVEL >= 2 ? 64 : 32;

template <class A>
static void lora_s_of(DType x_dtype, const void* x, int64_t m, int64_t k, const void* a_, int64_t row, int64_t column,
                      int64_t rank, float* s) {
  const A* a = static_cast<const A*>(a_);
  if (m <= kFewRows && column == 1 && row == k) {
    QUANTLIB_BY_DTYPE(x_dtype, few_dots, x, m, k, a, rank, s);
  } else {
    QUANTLIB_BY_DTYPE(x_dtype, many_dots, x, m, k, a, row, column, rank, s);
  }
}

void lora_s(DType x_dtype, const void* x, int64_t m, int64_t k, DType a_dtype, const void* a, int64_t row,
            int64_t column, int64_t rank, float* s) {
  QUANTLIB_BY_DTYPE(a_dtype, lora_s_of, x_dtype, x, m, k, a, row, column, rank, s);
}

// out[at + i * step] = scaling * sums[i]; sums is scaled as well.
template <class Out>
static void store_scaled(float* sums, int64_t count, float scaling, void* target, int64_t at, int64_t step) {
  Out* const out = static_cast<Out*>(target) + at;
  for (int64_t i = 0; i < count; ++i) sums[i] *= scaling;
  if (step == 1) return convert(sums, count, out);
  for (int64_t i = 0; i < count; ++i) narrow(sums[i], out + i * step);
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

template <class T>
static void read_run(const void* in, int64_t at, int64_t count, float* out) {
  convert(static_cast<const T*>(in) + at, count, out);
}

// Columns of x or dy at a time, of few rows.
constexpr int64_t kPart = 64;
static int64_t parts_grain(int64_t m) { return 16384 / (m * kPart + 1) + 1; }

template <class X>
static void few_da(const X* x, int64_t m, int64_t k, const float* ds, const Gradient& da) {
  parallel_for((k + kPart - 1) / kPart, parts_grain(m), [&](int64_t first, int64_t last) {
    alignas(64) float rows[kFewRows * kPart];
    const Scratch<float> sums(0, da.rank * kPart);
    for (int64_t c = first * kPart; c < k && c < last * kPart; c += kPart) {
      const int64_t count = k - c < kPart ? k - c : kPart, width = whole_vectors(count);
      for (int64_t r = 0; r < m; ++r) convert(x + r * k + c, count, rows + r * width);
      __builtin_memset(sums, 0, sizeof(float) * da.rank * width);
      add_product(da.rank, ds, 1, da.rank, rows, m, width, sums, width);
      for (int64_t j = 0; j < da.rank; ++j)
        QUANTLIB_BY_DTYPE(da.dtype, store_scaled, sums + j * width, count, da.scaling, da.out, j * k + c, 1);
    }
  });
}

// Both gradients in one pass over dy. Parts of ds are added up in their order at the end: it does not depend on the
// number of threads.
template <class X>
static void few_dy(const X* dy, int64_t m, int64_t n, DType b_dtype, const void* b, float* ds, const float* s,
                   const Gradient& db) {
  const int64_t rank = db.rank, width = whole_vectors(rank), parts = (n + kPart - 1) / kPart;
  const Scratch<float> sums(3, ds ? parts * m * width : 0), wide_s(4, db.out ? m * width : 0);
  for (int64_t r = 0; r < m && db.out; ++r) convert(s + r * rank, rank, wide_s + r * width);
  parallel_for(parts, parts_grain(m), [&](int64_t first, int64_t last) {
    alignas(64) float rows[kFewRows * kPart];
    const Scratch<float> block(0, kPart * width);
    for (int64_t part = first; part < last; ++part) {
      const int64_t c = part * kPart, count = n - c < kPart ? n - c : kPart;
      for (int64_t r = 0; r < m; ++r) convert(dy + r * n + c, count, rows + r * kPart);
      if (ds) {
        float* const to = sums + part * m * width;
        for (int64_t i = 0; i < count; ++i)
          QUANTLIB_BY_DTYPE(b_dtype, read_run, b, (c + i) * rank, rank, block + i * width);
        __builtin_memset(to, 0, sizeof(float) * m * width);
        add_product(m, rows, kPart, 1, block, count, width, to, width);
      }
      if (db.out) {
        __builtin_memset(block, 0, sizeof(float) * count * width);
        add_product(count, rows, 1, kPart, wide_s, m, width, block, width);
        for (int64_t i = 0; i < count; ++i)
          QUANTLIB_BY_DTYPE(db.dtype, store_scaled, block + i * width, rank, db.scaling, db.out, (c + i) * rank, 1);
      }
    }
  });
  for (int64_t r = 0; r < m && ds; ++r)
    for (int64_t j = 0; j < rank; j += W) {
      F32 total = {};
      for (int64_t part = 0; part < parts; ++part) total += load(sums + (part * m + r) * width + j);
      store_part(ds + r * rank + j, total, rank - j < W ? rank - j : W);
    }
}

template <class X>
static void da_of(const void* x, int64_t m, int64_t k, const float* ds, const Gradient& da) {
  if (m <= kFewRows) return few_da(static_cast<const X*>(x), m, k, ds, da);
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
  if (m <= kFewRows) return few_dy(dy, m, n, b_dtype, b, ds, s, db);
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
