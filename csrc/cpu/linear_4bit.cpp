// y = x W^T + bias and dx = dy W on a 4-bit weight. No more of it is decoded at a time than a panel, save for oneDNN.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "linear_4bit.cpp"
#include "each_isa.h"

namespace quantlib {

static bool by_onednn(const Linear4bit& a) { return a.dtype == DType::bf16 && by_onednn(a.m, a.n, a.k); }

// x w in `columns` columns, w decoded first and turned or not.
static void multiply_decoded(const Linear4bit& a, bool turned, int64_t columns, int64_t depth) {
  const BriefBlock<bf16> w(a.n * a.k);
  dequantize_4bit(a.w, a.n * a.k, DType::bf16, w);
  onednn_linear(static_cast<const bf16*>(a.x), w, turned, static_cast<const bf16*>(a.bias), a.m, columns, depth,
                static_cast<bf16*>(a.y));
  add_branch_to(a.dtype, a.branch, a.m, columns, a.y);
}

void linear_4bit(const Linear4bit& a) {
  if (by_onednn(a)) return multiply_decoded(a, true, a.n, a.k);
  QUANTLIB_DISPATCH(linear_4bit)(a);
}
void linear_4bit_dx(const Linear4bit& a) {
  if (by_onednn(a)) return multiply_decoded(a, false, a.k, a.n);
  QUANTLIB_DISPATCH(linear_4bit_dx)(a);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "decode_4bit.h"
#include "transpose.h"
#include "branch.h"
#include "tile.h"
#include "panels.h"
#include "matmul.h"
#if QUANTLIB_LEVEL > 0
#include "few_rows_4bit.h"
#endif
#if QUANTLIB_LEVEL >= 2
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
    prefetch_codes(w, row * k + begin, row * k + end);
  }
  SIMD_INLINE_MEMBER void prefetch_below(int64_t row, int64_t begin) const {
    __builtin_prefetch(w.packed + ((row + 64) * k + begin) / 2, 0, 2);
  }
};

#if QUANTLIB_LEVEL > 0
// Most rows for which dot products beat panels, measured: of bfloat16, with blocks of 32 or larger ones, and of floats.
constexpr int64_t kFewRowsOf32 = 20, kFewRows = 30, kFewFloatRows = QUANTLIB_LEVEL >= 2 ? 18 : 24;

// Returns false if it did not compute y, or not all of it exactly: see few_rows_4bit.h.
static bool multiply_few(const Linear4bit& a, const Product& product) {
#if QUANTLIB_LEVEL == 3
  if (a.dtype == DType::bf16)
    return a.m <= (a.w.block_shift == 5 ? kFewRowsOf32 : kFewRows) && few_rows<bf16, bf16>(product, a.w);
#endif
  if (a.m > kFewFloatRows) return false;
  switch (a.dtype) {
    case DType::f32: return few_rows<float, float>(product, a.w);
    case DType::f16: return few_rows<float, f16>(product, a.w);
    default: break;
  }
#if QUANTLIB_LEVEL == 1
  return few_rows<WideBf16, bf16>(product, a.w);
#else
  return few_rows<float, bf16>(product, a.w);
#endif
}
#endif

void linear_4bit(const Linear4bit& a) {
  const Product product{a.x, a.bias, a.m, a.n, a.k, a.y, nullptr, a.branch};
#if QUANTLIB_LEVEL > 0
  const bool whole_blocks = has_whole_blocks(a.w, a.k);
  if (whole_blocks && multiply_few(a, product)) return;
#endif
#if QUANTLIB_LEVEL >= 2
  if (whole_blocks) {
    multiply(a.dtype, product, [&](int64_t first, int64_t last) { return CodePanels(a.w, a.k, first, last); });
    return;
  }
#endif
  const PlainWeight plain(a.w, 0, a.n * a.k);
  const Rows4bit rows{plain.w, a.k};
  multiply(a.dtype, product, [&](int64_t, int64_t) { return RowPanels<Rows4bit>(rows); });
}

void linear_4bit_dx(const Linear4bit& a) {
  const PlainWeight plain(a.w, 0, a.n * a.k);
  const Product product{a.x, nullptr, a.m, a.k, a.n, a.y, nullptr, a.branch};
#if QUANTLIB_LEVEL == 3
  if (a.dtype == DType::bf16 && a.k % kColumns == 0) {
    multiply<bf16, bf16>(product, [&](int64_t, int64_t) { return PairPanels(plain.w, a.n, a.k); });
    return;
  }
#endif
  const Rows4bit rows{plain.w, a.k};
  multiply(a.dtype, product, [&](int64_t, int64_t) { return ColumnPanels<Rows4bit>(rows); });
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
