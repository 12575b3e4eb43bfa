// Dropout with a counter-based generator, so that backward recomputes the mask instead of keeping it.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "dropout.cpp"
#include "each_isa.h"

namespace quantlib {

void dropout(DType dtype, const void* x, int64_t n, uint64_t seed, double p, void* out) {
  QUANTLIB_DISPATCH(dropout)(dtype, x, n, seed, p, out);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"

// Counters of a vector, in lanes of 64 bits. Multiplications read the lower 32; what the upper ones hold does not
// matter.
constexpr int kCounters = W / 2;
typedef uint64_t U64 __attribute__((vector_size(4 * W)));

// multiply: of the lower halves. in_order: the lower halves of lanes, lane by lane, as two vectors; lane 2 i + v of 64
// bits becomes four of vector v.
#if QUANTLIB_LEVEL >= 2
constexpr U64 kOrder = {0, 4, 1, 5, 2, 6, 3, 7};
SIMD_INLINE U64 multiply(U64 a, uint64_t b) { return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(int64_t(b))); }
SIMD_INLINE void in_order(const U64* c, U32* out) {
  const __m512i low = _mm512_mask_shuffle_epi32((__m512i)c[0], 0xaaaa, (__m512i)c[1], _MM_PERM_ENUM(0xa0));
  const __m512i high = _mm512_mask_shuffle_epi32((__m512i)c[2], 0xaaaa, (__m512i)c[3], _MM_PERM_ENUM(0xa0));
  out[0] = (U32)_mm512_unpacklo_epi64(low, high);
  out[1] = (U32)_mm512_unpackhi_epi64(low, high);
}
#elif QUANTLIB_LEVEL == 1
constexpr U64 kOrder = {0, 2, 1, 3};
SIMD_INLINE U64 multiply(U64 a, uint64_t b) {
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(b)));
}
SIMD_INLINE void in_order(const U64* c, U32* out) {
  const __m256i low = _mm256_blend_epi32((__m256i)c[0], _mm256_slli_epi64((__m256i)c[1], 32), 0xaa);
  const __m256i high = _mm256_blend_epi32((__m256i)c[2], _mm256_slli_epi64((__m256i)c[3], 32), 0xaa);
  out[0] = (U32)_mm256_unpacklo_epi64(low, high);
  out[1] = (U32)_mm256_unpackhi_epi64(low, high);
}
#else
constexpr U64 kOrder = {0, 1};
#if defined(QUANTLIB_X86)
SIMD_INLINE U64 multiply(U64 a, uint64_t b) { return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(int64_t(b))); }
#elif defined(__ARM_NEON)
SIMD_INLINE U64 multiply(U64 a, uint64_t b) { return (U64)vmull_n_u32(vmovn_u64((uint64x2_t)a), uint32_t(b)); }
#else
SIMD_INLINE U64 multiply(U64 a, uint64_t b) { return (a & 0xffffffff) * b; }
#endif
SIMD_INLINE void in_order(const U64* c, U32* out) {
  for (int v = 0; v < 2; ++v) out[v] = U32{uint32_t(c[0][v]), uint32_t(c[1][v]), uint32_t(c[2][v]), uint32_t(c[3][v])};
}
#endif

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) of counters first, first + 1, ...,
// kVectors of them, which fill the multipliers.
constexpr int kVectors = 4;
SIMD_INLINE void philox(uint64_t first, uint64_t seed, U32* out) {
  U64 c[kVectors][4];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    c[v][0] = kOrder + (first + uint64_t(kCounters * v));
    c[v][1] = c[v][0] >> 32;
    c[v][2] = c[v][3] = U64{};
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const U64 a = multiply(c[v][0], 0xD2511F53), b = multiply(c[v][2], 0xCD9E8D57);
      c[v][0] = b >> 32 ^ c[v][1] ^ uint64_t(key0);
      c[v][2] = a >> 32 ^ c[v][3] ^ uint64_t(key1);
      c[v][1] = b;
      c[v][3] = a;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) in_order(c[v], out + 2 * v);
}

// Elements that the counters of one call serve, four each.
constexpr int64_t kChunk = 4 * kVectors * kCounters;

template <class T>
static void apply(const void* source, int64_t n, uint64_t seed, uint32_t threshold, float scale, void* target,
                  int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(source);
  T* out = static_cast<T*>(target);
  for (int64_t begin = first * kChunk; begin < n && begin < last * kChunk; begin += kChunk) {
    U32 random[2 * kVectors];
    philox(uint64_t(begin) / 4, seed, random);
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kVectors; ++v) {
      // Dropped elements become +0 by selection, not by a product: Inf * 0 would be NaN.
      const I32 kept = (I32)(random[v] >> 8 >= threshold);
      const int64_t i = begin + v * W;
      if (i + W <= n)
        store(out + i, (F32)((I32)(load(x + i) * scale) & kept));
      else if (i < n)
        store_part(out + i, (F32)((I32)(load_part(x + i, n - i) * scale) & kept), n - i);
    }
  }
}

void dropout(DType dtype, const void* x, int64_t n, uint64_t seed, double p, void* out) {
  // u >= p with u = r * 2^-24 exactly, as an integer comparison.
  const double scaled = p * 0x1p24;
  uint32_t threshold = uint32_t(scaled);
  threshold += threshold < scaled;
  const float scale = float(1.0 / (1.0 - p));
  parallel_for((n + kChunk - 1) / kChunk, 16384 / kChunk, [&](int64_t first, int64_t last) {
    QUANTLIB_BY_DTYPE(dtype, apply, x, n, seed, threshold, scale, out, first, last);
  });
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
