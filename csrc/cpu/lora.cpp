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
void lora_outer(DType x_dtype, const void* x, int64_t m, int64_t k, const float* s, int64_t rank, float scaling,
                DType dtype, void* out, int64_t row, int64_t column) {
  QUANTLIB_DISPATCH(lora_outer)(x_dtype, x, m, k, s, rank, scaling, dtype, out, row, column);
}
void add_dropped_branch(DType dtype, const Branch& branch, int64_t m, int64_t n, uint64_t seed, double p, void* y) {
  QUANTLIB_DISPATCH(add_dropped_branch)(dtype, branch, m, n, seed, p, y);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "branch.h"

constexpr int kTile = QUANTLIB_LEVEL == 2 ? 4 : 2;

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

template <class A>
static void lora_s_of(DType x_dtype, const void* x, int64_t m, int64_t k, const void* a_, int64_t row, int64_t column,
                      int64_t rank, float* s) {
  const A* a = static_cast<const A*>(a_);
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

// Rows of s and x that are summed in registers; a longer chain costs float32's accuracy.
constexpr int64_t kOuterRows = 16;

// out[j * stride + i] += sum of s[r, j] x[r, i] over `rows` rows, for J columns of s and `count` <= 2 W of x.
template <int J, class X>
static void outer(const float* s, int64_t rank, const X* x, int64_t k, int64_t rows, int64_t count, float* out,
                  int64_t stride) {
  F32 acc[J][2] = {};
  for (int64_t r = 0; r < rows; ++r) {
    F32 v[2] = {};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (count >= (i + 1) * W)
        v[i] = load(x + r * k + i * W);
      else if (count > i * W)
        v[i] = load_part(x + r * k + i * W, count - i * W);
    }
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) acc[j][i] = fma(set1(s[r * rank + j]), v[i], acc[j][i]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) store(out + j * stride + i * W, load(out + j * stride + i * W) + acc[j][i]);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class Out>
static void store_scaled(const float* sums, int64_t stride, int64_t rank, int64_t first, int64_t last, float scaling,
                         void* target, int64_t row, int64_t column) {
  Out* out = static_cast<Out*>(target);
  for (int64_t i = first; i < last; ++i)
    for (int64_t j = 0; j < rank; ++j) narrow(sums[j * stride + i - first] * scaling, out + j * row + i * column);
}

// A thread sums some columns of x over all rows, a few rows at a time: they are read in order, and once.
template <class X>
static void outer_of(const void* x_, int64_t m, int64_t k, const float* s, int64_t rank, float scaling, DType dtype,
                     void* out, int64_t row, int64_t column) {
  constexpr int kAtOnce = QUANTLIB_LEVEL == 2 ? 8 : 4;
  const X* x = static_cast<const X*>(x_);
  parallel_for((k + 2 * W - 1) / (2 * W), 16384 / (2 * W * (m + 1)) + 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * 2 * W, end = last * 2 * W < k ? last * 2 * W : k, stride = (last - first) * 2 * W;
    const Scratch<float> sums(0, rank * stride);
    __builtin_memset(sums, 0, sizeof(float) * rank * stride);
    for (int64_t r = 0; r < m; r += kOuterRows) {
      const int64_t rows = m - r < kOuterRows ? m - r : kOuterRows;
      for (int64_t i = begin; i < end; i += 2 * W) {
        const auto tile = [&](auto one, int64_t j) {
          outer<decltype(one)::value>(s + r * rank + j, rank, x + r * k + i, k, rows, end - i,
                                      sums + j * stride + i - begin, stride);
        };
        int64_t j = 0;
        for (; j + kAtOnce <= rank; j += kAtOnce) tile(Count<kAtOnce>{}, j);
        for (; j < rank; ++j) tile(Count<1>{}, j);
      }
    }
    QUANTLIB_BY_DTYPE(dtype, store_scaled, sums, stride, rank, begin, end, scaling, out, row, column);
  });
}

void lora_outer(DType x_dtype, const void* x, int64_t m, int64_t k, const float* s, int64_t rank, float scaling,
                DType dtype, void* out, int64_t row, int64_t column) {
  QUANTLIB_BY_DTYPE(x_dtype, outer_of, x, m, k, s, rank, scaling, dtype, out, row, column);
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
