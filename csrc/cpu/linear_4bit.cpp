// y = x W^T + bias and dx = dy W on a 4-bit weight, never holding more of it decoded than a panel.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "linear_4bit.cpp"
#include "each_isa.h"

namespace quantlib {

void linear_4bit(const Linear4bit& a) { QUANTLIB_DISPATCH(linear_4bit)(a); }
void linear_4bit_dx(const Linear4bit& a) { QUANTLIB_DISPATCH(linear_4bit_dx)(a); }

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "decode_4bit.h"
#include "matmul.h"
#if QUANTLIB_LEVEL == 2
#include "codes_4bit.h"
#endif

struct Rows4bit {
  const Weight4bit& w;
  int64_t k;

  template <class E>
  SIMD_INLINE_MEMBER void decode(int64_t row, int64_t begin, int64_t end, E* out) const {
    QUANTLIB_ISA::decode(w, row * k + begin, row * k + end, out);
  }
  SIMD_INLINE_MEMBER void prefetch(int64_t row, int64_t begin, int64_t end) const {
    prefetch_next(w, k, kColumns, row, begin, end);
  }
  SIMD_INLINE_MEMBER void prefetch_below(int64_t row, int64_t begin) const {
    __builtin_prefetch(w.packed + ((row + 64) * k + begin) / 2, 0, 2);
  }
};

#if QUANTLIB_LEVEL == 2
// Up to M rows of x, put in order, times rows [first, last) of the weight, kStrip at most, in rows m and on of y.
// Returns whether all is finite.
template <int M = kFewAtOnce>
static bool few_rows(const Linear4bit& a, const Weight4bit& w, const bf16* x, int64_t m, int64_t rows, int64_t first,
                     int64_t last) {
  if constexpr (M > 1)
    if (rows < M) return few_rows<M - 1>(a, w, x, m, rows, first, last);
  const auto dots = a.w.block_shift == 5 && a.k >= 32   ? few_dots<M, 4>
                    : a.w.block_shift == 6 && a.k >= 64 ? few_dots<M, 2>
                                                        : few_dots<M, 1>;
  float sums[M * kStrip] = {};
  const int64_t stretches = (a.k * M + kFewElements - 1) / kFewElements;
  const int64_t depth = (a.k / stretches + kGroup - 1) / kGroup * kGroup;
  for (int64_t k = 0; k < a.k; k += depth)
    for (int64_t n = first; n < last; n += kFewColumns<M>)
      dots(w, x, a.k, n, last, k, k + depth < a.k ? k + depth : a.k, sums + n - first);
  return finish<bf16>({a.x, a.bias, a.m, a.n, a.k, a.y}, sums, kStrip, m, M, first, last - first);
}

static bool few_rows(const Linear4bit& a) {
  const int64_t length = (a.k + kGroup - 1) / kGroup * kGroup;
  const int64_t passes = (a.m + kFewAtOnce - 1) / kFewAtOnce;
  const Scratch<bf16> x(1, a.m * length);
  for (int64_t m = 0; m < a.m; ++m) permute_few(static_cast<const bf16*>(a.x) + m * a.k, a.k, x + m * length);
  bool finite = true;
  parallel_for((a.n + 3) / 4, 16384 / a.k + 1, [&](int64_t begin, int64_t end) {
    const int64_t last = end * 4 < a.n ? end * 4 : a.n;
    for (int64_t n = begin * 4; n < last; n += kStrip) {
      const int64_t stop = n + kStrip < last ? n + kStrip : last;
      const PlainWeight plain(a.w, n * a.k, stop * a.k);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t m = a.m * pass / passes, rows = a.m * (pass + 1) / passes - m;
        if (!few_rows(a, plain.w, x + m * length, m, rows, n, stop)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      }
    }
  });
  return finite;
}

// Returns false if it did not compute y, or not all of it exactly: see codes_4bit.h.
static bool multiply_codes(const Linear4bit& a, const Product& product) {
  if (!has_whole_blocks(a.w, a.k)) return false;
  if (a.dtype == DType::bf16 && a.m <= kFewRows) return few_rows(a);
  return multiply(a.dtype, product, [&](int64_t first, int64_t last) { return CodePanels(a.w, a.k, first, last); });
}
#endif

void linear_4bit(const Linear4bit& a) {
  const Product product{a.x, a.bias, a.m, a.n, a.k, a.y};
#if QUANTLIB_LEVEL == 2
  if (multiply_codes(a, product)) return;
#endif
  const PlainWeight plain(a.w, 0, a.n * a.k);
  const Rows4bit rows{plain.w, a.k};
  multiply(a.dtype, product, [&](int64_t, int64_t) { return RowPanels<Rows4bit>{rows}; });
}

void linear_4bit_dx(const Linear4bit& a) {
  const PlainWeight plain(a.w, 0, a.n * a.k);
  const Rows4bit rows{plain.w, a.k};
  multiply(a.dtype, {a.x, nullptr, a.m, a.k, a.n, a.y}, [&](int64_t, int64_t) { return ColumnPanels<Rows4bit>{rows}; });
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
