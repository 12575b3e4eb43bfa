// y = x W^T + bias on a 4-bit weight, never holding more of the decoded weight than a panel of a few rows.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "linear_4bit.cpp"
#include "each_isa.h"

namespace quantlib {

void linear_4bit(const Linear4bit& a) { QUANTLIB_DISPATCH(linear_4bit)(a); }

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "decode_4bit.h"
#include "dot_tile.h"

// What one multiplies in: x and decoded weights as E, rows padded with zeros to a multiple of kStep.
template <class E>
struct Operands {
  const E* x;
  int64_t ldx;  // also the padded k
};

template <class T>
SIMD_INLINE void add_bias(const void* bias, int64_t n, float* row, int64_t count) {
  const T* b = static_cast<const T*>(bias) + n;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(row + i, load(row + i) + load(b + i));
  for (; i < count; ++i) row[i] += widen(b[i]);
}

template <class T>
static void finish_row(const void* bias, void* y, int64_t offset, int64_t n, float* row, int64_t count) {
  if (bias) add_bias<T>(bias, n, row, count);
  convert(row, count, static_cast<T*>(y) + offset + n);
}

// Rows [first, last) of the weight in panels of kPanel: decode once, then every row of x against the panel.
template <class E>
static void multiply(const Linear4bit& a, const Operands<E>& operands, int64_t first, int64_t last) {
  const int64_t kp = operands.ldx;
  const Scratch<E> panel(0, kPanel * kp);
  for (int64_t n = first; n < last; n += kPanel) {
    const int64_t rows = last - n < kPanel ? last - n : kPanel;
    for (int64_t r = 0; r < kPanel; ++r) {
      E* row = panel + r * kp;
      if (r < rows) {
        decode(a.w, (n + r) * a.k, (n + r + 1) * a.k, row);
        __builtin_memset(row + a.k, 0, sizeof(E) * (kp - a.k));
      } else if (r < (rows + kTileN - 1) / kTileN * kTileN) {
        __builtin_memset(row, 0, sizeof(E) * kp);
      }
    }
    for (int64_t m = 0; m < a.m; m += kTileM) {
      float out[kTileM][kPanel];
      const int64_t count = a.m - m < kTileM ? a.m - m : kTileM;
      for (int64_t r = 0; r < rows; r += kTileN)
        dot_rows(operands.x + m * kp, kp, panel + r * kp, kp, kp, count, out[0] + r, kPanel);
      for (int64_t i = 0; i < count; ++i)
        QUANTLIB_BY_DTYPE(a.dtype, finish_row, a.bias, a.y, (m + i) * a.n, n, out[i], rows);
    }
  }
}

// x as E with padded rows; x itself where it already is that.
template <class T, class E>
static void pad_rows(const void* x, int64_t m, int64_t k, int64_t kp, E* out) {
  parallel_for(m, (1 << 15) / (k + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      convert(static_cast<const T*>(x) + i * k, k, out + i * kp);
      __builtin_memset(out + i * kp + k, 0, sizeof(E) * (kp - k));
    }
  });
}

template <class E>
static void run(const Linear4bit& a, DType element) {
  const int64_t kp = (a.k + dot_step<E>() - 1) / dot_step<E>() * dot_step<E>();
  Operands<E> operands{static_cast<const E*>(a.x), kp};
  const bool as_is = a.dtype == element && kp == a.k;
  const Scratch<E> x(1, as_is ? 0 : a.m * kp);
  if (!as_is) {
    operands.x = x;
    switch (a.dtype) {
      case DType::f32: pad_rows<float, E>(a.x, a.m, a.k, kp, x); break;
      case DType::f16: pad_rows<f16, E>(a.x, a.m, a.k, kp, x); break;
      case DType::bf16: pad_rows<bf16, E>(a.x, a.m, a.k, kp, x); break;
    }
  }
  parallel_for((a.n + kTileN - 1) / kTileN, 1, [&](int64_t first, int64_t last) {
    multiply(a, operands, first * kTileN, last * kTileN < a.n ? last * kTileN : a.n);
  });
}

void linear_4bit(const Linear4bit& a) {
#if QUANTLIB_LEVEL == 2
  if (a.dtype == DType::bf16) return run<bf16>(a, DType::bf16);
#endif
  // Weights enter unrounded here: one rounding less than multiplying by the dequantized weight.
  run<float>(a, DType::f32);
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
