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

struct Rows4bit {
  const Weight4bit& w;
  int64_t k;

  template <class E>
  SIMD_INLINE_MEMBER void decode(int64_t row, int64_t begin, int64_t end, E* out) const {
    QUANTLIB_ISA::decode(w, row * k + begin, row * k + end, out);
  }
  SIMD_INLINE_MEMBER void prefetch(int64_t first, int64_t last) const {
    QUANTLIB_ISA::prefetch(w, first * k, last * k);
  }
};

#if QUANTLIB_LEVEL == 2
// Few rows of x: decode in registers straight into the products, nothing is written. kRows rows of the weight at a
// time give independent chains of sums and share the loads of x. M = 6 is what 32 registers hold.
constexpr int kRows = 4, kMostAtOnce = 6;

template <int M, int Segment>
static void stream_rows(const Weight4bit& w, const bf16* x, int64_t k, int64_t row, float (*out)[kRows]) {
  F32 acc[M][kRows] = {};
  const LookupTables tables(w.codebook);
  const int64_t segment = Segment ? Segment : (int64_t(1) << w.block_shift) < k ? int64_t(1) << w.block_shift : k;
  // k and the block size are multiples of 32 and one divides the other, so a segment lies in one block.
  for (int64_t begin = 0; begin < k; begin += segment) {
    __m512i table[kRows];
    const uint8_t* packed[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = (row + r) * k + begin;
      table[r] = tables.flushing(w.absmax[i >> w.block_shift]);
      packed[r] = w.packed + i / 2;
      // The rows that come next: four short streams defeat the hardware's prefetcher when the weight is in memory.
      __builtin_prefetch(packed[r] + kRows * k / 2);
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < segment; i += 32) {
      __m512bh b[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) b[r] = (__m512bh)lookup32(packed[r] + i / 2, table[r]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m512bh v = load_raw<__m512bh>(x + m * k + begin + i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[m][r] = (F32)_mm512_dpbf16_ps((__m512)acc[m][r], v, b[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) out[m][r] = sum(acc[m][r]);
}

// The usual block of 64 has a loop of known length, which is worth a tenth.
template <int M>
static void stream_rows(const Weight4bit& w, const bf16* x, int64_t k, int64_t row, float (*out)[kRows]) {
  if (w.block_shift == 6 && k >= 64) return stream_rows<M, 64>(w, x, k, row, out);
  stream_rows<M, 0>(w, x, k, row, out);
}

// The same for rows already decoded, [kRows, k].
template <int M>
static void dot_rows(const bf16* rows, const bf16* x, int64_t k, float (*out)[kRows]) {
  F32 acc[M][kRows] = {};
  for (int64_t i = 0; i < k; i += 32) {
    __m512bh b[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) b[r] = load_raw<__m512bh>(rows + r * k + i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512bh v = load_raw<__m512bh>(x + m * k + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[m][r] = (F32)_mm512_dpbf16_ps((__m512)acc[m][r], v, b[r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) out[m][r] = sum(acc[m][r]);
}

// rows: kRows decoded rows of the weight, or null to decode them on the way.
template <int M>
static void some_rows(const Weight4bit& w, const bf16* rows, const bf16* x, int64_t k, int64_t row,
                      float (*out)[kRows]) {
  if (rows) return dot_rows<M>(rows, x, k, out);
  stream_rows<M>(w, x, k, row, out);
}

static void some_rows(int64_t m, const Weight4bit& w, const bf16* rows, const bf16* x, int64_t k, int64_t row,
                      float (*out)[kRows]) {
  switch (m) {
    case 1: return some_rows<1>(w, rows, x, k, row, out);
    case 2: return some_rows<2>(w, rows, x, k, row, out);
    case 3: return some_rows<3>(w, rows, x, k, row, out);
    case 4: return some_rows<4>(w, rows, x, k, row, out);
    case 5: return some_rows<5>(w, rows, x, k, row, out);
    default: return some_rows<kMostAtOnce>(w, rows, x, k, row, out);
  }
}

// Up to about 40 rows this beats panels, which pay for turning the weight around (4096 x 4096, one thread).
static bool can_stream(const Linear4bit& a) {
  const int64_t block = int64_t(1) << a.w.block_shift;
  return a.dtype == DType::bf16 && a.m <= 40 && a.n % kRows == 0 && a.k % 32 == 0 && a.k > 0 &&
         (a.k % block == 0 || block % a.k == 0);
}

static void stream(const Linear4bit& a) {
  const bf16* x = static_cast<const bf16*>(a.x);
  const bf16* bias = static_cast<const bf16*>(a.bias);
  bf16* y = static_cast<bf16*>(a.y);
  const int64_t passes = (a.m + kMostAtOnce - 1) / kMostAtOnce;
  parallel_for(a.n / kRows, 16384 / a.k + 1, [&](int64_t first, int64_t last) {
    const PlainWeight plain(a.w, first * kRows * a.k, last * kRows * a.k);
    const Weight4bit& w = plain.w;
    const Scratch<bf16> rows(0, passes > 1 ? kRows * a.k : 0);
    for (int64_t n = first * kRows; n < last * kRows; n += kRows) {
      if (passes > 1) {
        decode(w, n * a.k, (n + kRows) * a.k, static_cast<bf16*>(rows));
        prefetch(w, (n + kRows) * a.k, (n + 2 * kRows) * a.k);
      }
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t begin = a.m * pass / passes, end = a.m * (pass + 1) / passes;
        float out[kMostAtOnce][kRows];
        some_rows(end - begin, w, passes > 1 ? static_cast<bf16*>(rows) : nullptr, x + begin * a.k, a.k, n, out);
        for (int64_t m = begin; m < end; ++m)
          for (int r = 0; r < kRows; ++r)
            narrow(out[m - begin][r] + (bias ? widen(bias[n + r]) : 0.0f), y + m * a.n + n + r);
      }
    }
  });
}
#endif

void linear_4bit(const Linear4bit& a) {
#if QUANTLIB_LEVEL == 2
  if (can_stream(a)) return stream(a);
#endif
  const PlainWeight plain(a.w, 0, a.n * a.k);
  multiply<true>(a.dtype, {a.x, a.bias, a.m, a.n, a.k, a.y}, Rows4bit{plain.w, a.k});
}

void linear_4bit_dx(const Linear4bit& a) {
  const PlainWeight plain(a.w, 0, a.n * a.k);
  multiply<false>(a.dtype, {a.x, nullptr, a.m, a.k, a.n, a.y}, Rows4bit{plain.w, a.k});
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
