// LoRA (Hu et al., 2021): s = x a^T. Its product with b is added by the base product, see branch.h.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "lora.cpp"
#include "each_isa.h"

namespace quantlib {

void lora_s(DType x_dtype, const void* x, int64_t m, int64_t k, DType a_dtype, const void* a, int64_t rank, float* s) {
  QUANTLIB_DISPATCH(lora_s)(x_dtype, x, m, k, a_dtype, a, rank, s);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"

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
static void lora_s_of(DType x_dtype, const void* x, int64_t m, int64_t k, const void* a, int64_t rank, float* s) {
  switch (x_dtype) {
    case DType::f32: return lora_s_typed<float>(x, m, k, static_cast<const A*>(a), rank, s);
    case DType::f16: return lora_s_typed<f16>(x, m, k, static_cast<const A*>(a), rank, s);
    case DType::bf16: return lora_s_typed<bf16>(x, m, k, static_cast<const A*>(a), rank, s);
  }
}

void lora_s(DType x_dtype, const void* x, int64_t m, int64_t k, DType a_dtype, const void* a, int64_t rank, float* s) {
  QUANTLIB_BY_DTYPE(a_dtype, lora_s_of, x_dtype, x, m, k, a, rank, s);
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
