// 4-bit quantize, dequantize and embedding.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "quantize.cpp"
#include "each_isa.h"

namespace quantlib {

void quantize_4bit(DType dtype, const void* x, int64_t n, int block_shift, const Codebook& codebook, uint8_t* packed,
                   float* absmax) {
  QUANTLIB_DISPATCH(quantize_4bit)(dtype, x, n, block_shift, codebook, packed, absmax);
}

void dequantize_4bit(const Weight4bit& w, int64_t n, DType dtype, void* out) {
  QUANTLIB_DISPATCH(dequantize_4bit)(w, n, dtype, out);
}

void embedding_4bit(const Weight4bit& w, const int64_t* indices, int64_t count, int64_t dim, DType dtype, void* out) {
  QUANTLIB_DISPATCH(embedding_4bit)(w, indices, count, dim, dtype, out);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "decode_4bit.h"

constexpr int64_t kMaxBlock = 4096;
constexpr float kMinAbsmax = 1e-38f;

// Number of thresholds strictly below each element; 15 for NaN.
#if QUANTLIB_LEVEL >= 2
struct Ranker {
  __m512 middle, by4, by2, by1;  // thresholds, shifted so that a binary search indexes them by its rank so far

  SIMD_INLINE_MEMBER explicit Ranker(const Codebook& codebook) {
    const __m512 t = _mm512_maskz_loadu_ps(0x7fff, codebook.thresholds);
    middle = _mm512_set1_ps(codebook.thresholds[7]);
    by4 = _mm512_maskz_loadu_ps(0x0fff, codebook.thresholds + 3);
    by2 = _mm512_maskz_loadu_ps(0x3fff, codebook.thresholds + 1);
    by1 = t;
  }
  SIMD_INLINE_MEMBER I32 operator()(F32 v) const {
    const __m512 x = (__m512)v;
    __m512i rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, middle, _CMP_NLE_UQ), 8);
    rank = step(x, by4, rank, 4);
    rank = step(x, by2, rank, 2);
    return (I32)step(x, by1, rank, 1);
  }
  SIMD_INLINE __m512i step(__m512 x, __m512 thresholds, __m512i rank, int width) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(rank, thresholds), _CMP_NLE_UQ);
    return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(width));
  }
};
SIMD_INLINE void store_u8(uint8_t* p, I32 v) { store_raw(p, _mm512_cvtepi32_epi8((__m512i)v)); }
#else
struct Ranker {
  F32 thresholds[15];

  SIMD_INLINE_MEMBER explicit Ranker(const Codebook& codebook) {
    for (int i = 0; i < 15; ++i) thresholds[i] = set1(codebook.thresholds[i]);
  }
  SIMD_INLINE_MEMBER I32 operator()(F32 x) const {
    I32 rank = set1(15);
    for (int i = 0; i < 15; ++i) rank += (I32)(x <= thresholds[i]);
    return rank;
  }
};
SIMD_INLINE void store_u8(uint8_t* p, I32 v) { store_raw(p, __builtin_convertvector(v, U8)); }
#endif

// Two ranks a byte, high nibble first, mapped to codes; n even.
SIMD_INLINE void pack(const uint8_t* ranks, int64_t n, const Codebook& codebook, uint8_t* packed) {
  int64_t i = 0;
#if QUANTLIB_LEVEL > 0
  const __m256i order = _mm256_broadcastsi128_si256(load_raw<__m128i>(codebook.order));
  const __m256i weights = _mm256_set1_epi16(0x0110);
  for (; i + 32 <= n; i += 32) {
    const __m256i codes = _mm256_shuffle_epi8(order, load_raw<__m256i>(ranks + i));
    const __m256i words = _mm256_maddubs_epi16(codes, weights);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
    store_raw(packed + i / 2, _mm256_castsi256_si128(bytes));
  }
#endif
  for (; i < n; i += 2) packed[i / 2] = uint8_t(codebook.order[ranks[i]] << 4 | codebook.order[ranks[i + 1]]);
}

#if QUANTLIB_LEVEL >= 2
// A full block of bfloat16, none of which is scaled: thresholds of scaled values are made into thresholds of bfloat16,
// the largest that are not above them when scaled. Each is the nearest to threshold * absmax or the one below, since
// scaling is exact to 2^-22 and neighbours are 2^-9 apart; as long as no threshold becomes subnormal, and no bfloat16
// zero when scaled.
constexpr float kLeastUsual = 0x1p-100f, kMostUsual = 0x1p14f;
static void quantize_block(const bf16* x, int64_t count, float absmax, const Codebook& codebook, uint8_t* packed) {
  // Negative ones with all other bits turned: integers in the order of the numbers.
  const auto in_order = [](__m512i bits) __attribute__((always_inline)) {
    return _mm512_xor_si512(bits, _mm512_srli_epi16(_mm512_srai_epi16(bits, 15), 1));
  };
  const __m512 thresholds = _mm512_maskz_loadu_ps(0x7fff, codebook.thresholds);
  const __m512i product = (__m512i)_mm512_mul_ps(thresholds, _mm512_set1_ps(absmax));
  const __m512i nearest =
      _mm512_and_si512(_mm512_add_epi32(product, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32(int(0xffff0000)));
  const __m512 scaled = _mm512_mul_ps((__m512)nearest, _mm512_set1_ps(1.0f / absmax));
  const __mmask16 above = _mm512_cmp_ps_mask(scaled, thresholds, _CMP_NLE_UQ);
  const __m512i words = in_order(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16))));
  const __m512i by1 = _mm512_mask_sub_epi16(words, above, words, _mm512_set1_epi16(1));
  const __m512i lanes = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,  //
                                                              0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
  const auto from = [&](int first) __attribute__((always_inline)) {
    return _mm512_permutexvar_epi16(_mm512_add_epi16(lanes, _mm512_set1_epi16(int16_t(first))), by1);
  };
  const __m512i middle = _mm512_permutexvar_epi16(_mm512_set1_epi16(7), by1), by4 = from(3), by2 = from(1);
  const __m512i order = _mm512_cvtepu8_epi16(_mm256_castsi128_si256(load_raw<__m128i>(codebook.order)));
  for (int64_t i = 0; i < count; i += 32) {
    const __m512i v = in_order(_mm512_loadu_si512(x + i));
    __m512i rank = _mm512_maskz_set1_epi16(_mm512_cmpgt_epi16_mask(v, middle), 8);
    const auto step = [&](__m512i by, int16_t width) __attribute__((always_inline)) {
      const __mmask32 above = _mm512_cmpgt_epi16_mask(v, _mm512_permutexvar_epi16(rank, by));
      rank = _mm512_mask_add_epi16(rank, above, rank, _mm512_set1_epi16(width));
    };
    step(by4, 4);
    step(by2, 2);
    step(by1, 1);
    const __m512i codes = _mm512_permutexvar_epi16(rank, order);
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi32(codes, 4), _mm512_srli_epi32(codes, 16));
    store_raw(packed + i / 2, _mm512_cvtepi32_epi8(pairs));
  }
}
#endif

// A block by its absmax. Full ones multiply by the reciprocal, the trailing partial one divides: bitsandbytes'
// arithmetic. Scaled values beyond [-1, 1] need no clamping, the outermost thresholds lie within.
template <class T>
static void quantize_block(const T* x, int64_t count, bool full, float absmax, const Codebook& codebook,
                           uint8_t* packed) {
  const Ranker rank(codebook);
  const float m = absmax < kMinAbsmax ? kMinAbsmax : absmax;
  uint8_t ranks[kMaxBlock];
  if (full) {
    const F32 factor = set1(1.0f / m);
    for (int64_t i = 0; i < count; i += W) store_u8(ranks + i, rank(load(x + i) * factor));
  } else {
    for (int64_t i = 0; i < count; i += W) {
      const F32 v = i + W <= count ? load(x + i) : load_part(x + i, count - i);
      store_u8(ranks + i, rank(v / set1(m)));
    }
    // An odd count is padded with the code of zero, which load_part's zeros give unless the vector was full
    // or the division made them NaN.
    if (count % 2) store_u8(ranks + count, rank(F32{})), ++count;
  }
  pack(ranks, count, codebook, packed);
}

template <class T>
static void quantize_blocks(const void* source, int64_t n, int block_shift, const Codebook& codebook, uint8_t* packed,
                            float* absmaxes, int64_t first, int64_t last) {
  // Several maxima first: block by block, each would wait for its own (1.1 times as long).
  constexpr int64_t kAtOnce = 512;
  const T* const x = static_cast<const T*>(source);
  const int64_t block_size = int64_t(1) << block_shift, blocks = (kAtOnce + block_size - 1) / block_size;
  for (; first < last; first += blocks) {
    const int64_t end = first + blocks < last ? first + blocks : last;
    const auto each = [&](auto visit) {
      for (int64_t block = first; block < end; ++block) {
        const int64_t begin = block << block_shift, left = n - begin;
        visit(x + begin, left < block_size ? left : block_size, absmaxes[block], packed + begin / 2);
      }
    };
    each([&](const T* x, int64_t count, float& m, uint8_t*) {
      m = absmax(x, count);
      if (count < block_size && m < kMinAbsmax) m = kMinAbsmax;
    });
    each([&](const T* x, int64_t count, float m, uint8_t* packed) {
      const bool full = count == block_size;
#if QUANTLIB_LEVEL >= 2
      if constexpr (__is_same(T, bf16))
        if (full && m >= kLeastUsual && m <= kMostUsual) return quantize_block(x, count, m, codebook, packed);
#endif
      quantize_block(x, count, full, m, codebook, packed);
    });
  }
}

void quantize_4bit(DType dtype, const void* x, int64_t n, int block_shift, const Codebook& codebook, uint8_t* packed,
                   float* absmaxes) {
  const int64_t blocks = (n + (int64_t(1) << block_shift) - 1) >> block_shift;
  parallel_for(blocks, (int64_t(1) << 14) >> block_shift, [&](int64_t first, int64_t last) {
    QUANTLIB_BY_DTYPE(dtype, quantize_blocks, x, n, block_shift, codebook, packed, absmaxes, first, last);
  });
}

template <class T>
static void decode_to(const Weight4bit& w, int64_t begin, int64_t end, void* out) {
  decode(w, begin, end, static_cast<T*>(out) + begin);
}

void dequantize_4bit(const Weight4bit& weight, int64_t n, DType dtype, void* out) {
  constexpr int64_t kChunk = 1 << 14;
  parallel_for((n + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    const int64_t end = last * kChunk < n ? last * kChunk : n;
    const PlainWeight plain(weight, first * kChunk, end);
    QUANTLIB_BY_DTYPE(dtype, decode_to, plain.w, first * kChunk, end, out);
  });
}

template <class T>
static void gather(const Weight4bit& w, const int64_t* indices, int64_t dim, void* out, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i)
    decode(w, indices[i] * dim, (indices[i] + 1) * dim, static_cast<T*>(out) + i * dim);
}

void embedding_4bit(const Weight4bit& w, const int64_t* indices, int64_t count, int64_t dim, DType dtype, void* out) {
  parallel_for(count, (1 << 14) / (dim + 1) + 1, [&](int64_t first, int64_t last) {
    QUANTLIB_BY_DTYPE(dtype, gather, w, indices, dim, out, first, last);
  });
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
