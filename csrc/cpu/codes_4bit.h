// Products with the codes of a 4-bit weight: x is multiplied by the codebook's values and the sum over each block by
// its absmax, in float32. Nothing is rounded to bfloat16 but the codebook, and no table is filled per block, so four
// shifts and four lookups decode 128 weights. Included after decode_4bit.h and matmul.h; AVX-512 only.
//
// A sum over a block may be finite, infinite or NaN where the sum of products with the weights is not, if absmax is
// not finite or x is huge. The result is never finite then, so the caller looks for that and computes it anew.

// Rows of the weight begin at a multiple of 16 bytes, and blocks do not straddle them.
static bool has_whole_blocks(const Weight4bit& w, int64_t k) {
  const int64_t block = int64_t(1) << w.block_shift;
  return k > 0 && k % 32 == 0 && (k % block == 0 || block % k == 0);
}

// The codebook in bfloat16, twice: vpermw looks at the low five bits of a 16-bit lane, of which four are the code.
SIMD_INLINE __m512i codebook_bf16(const Codebook& codebook) {
  const __m512 codes = _mm512_loadu_ps(codebook.code);
  return (__m512i)_mm512_cvtne2ps_pbh(codes, codes);
}

// Lanes of 8 codes of a column: decodes to 4 vectors of pairs or 8 of floats.
template <class E>
struct Coded {
  typedef E Element;
  static constexpr int kAtOnce = 8 / int(kPer<E>);
  const uint32_t* words;
  __m512i table;

  SIMD_INLINE_MEMBER Coded(const uint32_t* words, const Codebook& codebook)
      : words(words), table(kPer<E> == 2 ? codebook_bf16(codebook) : load_raw<__m512i>(codebook.code)) {}
  SIMD_INLINE_MEMBER Coded from(int64_t step) const {
    Coded later = *this;
    later.words += step / kAtOnce * kColumns;
    return later;
  }
  SIMD_INLINE_MEMBER F32 vector(int64_t step, int s, int v) const {
    const __m512i codes = load_raw<__m512i>(words + step / kAtOnce * kColumns + v * W);
    if constexpr (kPer<E> == 1)
      return (F32)_mm512_permutexvar_epi32(_mm512_srli_epi32(codes, unsigned(4 * (s ^ 1))), table);
    // The high and the low nibble of byte s go to the low and the high half of each lane.
    const int64_t nibbles = (8 * s + 4) | int64_t(8 * s) << 16;
    const __m512i shifts = _mm512_set1_epi64(nibbles | (nibbles + 0x200020) << 32);
    return (F32)_mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, codes), table);
  }
};

// Panels for multiply(): the packed weight is turned, then looked up, and the sums of blocks are scaled.
struct CodePanels {
  // Lookups hide behind the products of floats, not behind the twice as fast ones of bfloat16.
  template <class E>
  static constexpr int64_t kCodedTiles = kPer<E> == 1 ? 4 : 0;
  PlainWeight plain;
  int64_t k, blocks;
  int scale_shift;
  Scratch<float> absmax;  // [blocks, kColumns] and what the transpose writes beyond

  CodePanels(const Weight4bit& weight, int64_t k, int64_t first, int64_t last)
      : plain(weight, first * k, last * k),
        k(k),
        blocks(k >> weight.block_shift),
        scale_shift(weight.block_shift),
        absmax(3, (blocks + W) * kColumns) {}

  void start(int64_t first, int64_t count) {
    for (int64_t group = 0; group < kColumns; group += W) {
      const int64_t row = first + (group < count ? group : count - 1), last = first + count - 1 - row;
      if (blocks > 0)
        transpose(reinterpret_cast<const uint32_t*>(plain.w.absmax) + row * blocks, blocks, last, blocks,
                  reinterpret_cast<uint32_t*>(static_cast<float*>(absmax)) + group);
      for (int64_t i = 0; i < W && blocks == 0; ++i)
        absmax[group + i] = plain.w.absmax[(row + (i < last ? i : last)) * k >> scale_shift];
    }
  }
  const float* scales(int64_t begin) const { return absmax + (begin >> scale_shift) * kColumns; }

  template <class E>
  Coded<E> coded(int64_t first, int64_t count, int64_t begin, int64_t length, uint32_t* words) const {
    for (int64_t group = 0; group < kColumns; group += W) {
      const int64_t row = first + (group < count ? group : count - 1), last = first + count - 1 - row;
      const uint8_t* packed = plain.w.packed + (row * k + begin) / 2;
      for (int64_t i = 0; i < W; ++i) prefetch_next(plain.w, k, kColumns, row + i, begin, begin + length);
      transpose(reinterpret_cast<const uint32_t*>(packed), k / 8, last, length / 8, words + group);
    }
    return Coded<E>(words, plain.w.codebook);
  }

  template <class E>
  void build(int64_t first, int64_t count, int64_t begin, int64_t length, E* panel) const {
    alignas(64) uint32_t words[kStretch / 8 * kColumns];
    const Coded<E> codes = coded<E>(first, count, begin, length, words);
    for (int64_t i = 0; i < length / kPer<E>; i += codes.kAtOnce)
#pragma GCC unroll 8
      for (int s = 0; s < codes.kAtOnce; ++s)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          store_raw(panel + ((i + s) * kColumns + v * W) * kPer<E>, codes.vector(i, s, v));
  }
};

// Few rows of x: decoded in registers straight into the products. A 64-byte load holds 128 codes in 32 words of 4;
// shifted by 0, 4, 8 and 12 bits the words look up codes 1, 0, 3 and 2 of each, so x is put in that order first.
constexpr int64_t kGroup = 128;
// Most rows for which this beats panels, and the most that are multiplied by a decoded group at once.
constexpr int64_t kFewRows = 18;
constexpr int kFewAtOnce = 6;
// Rows of the weight in one strip, which stays in L2 until all rows of x have passed it.
constexpr int64_t kStrip = 64;
// Elements of x, in all rows, that stay in L1 while the rows of a strip pass them.
constexpr int64_t kFewElements = 24576;
// Rows of the weight at a time: independent chains of sums that share the loads of x, as far as registers go.
template <int M>
constexpr int kFewColumns = M > 3 ? 2 : 4;

static void permute_few(const bf16* x, int64_t k, bf16* out) {
  for (int64_t begin = 0; begin < k; begin += kGroup)
    for (int64_t i = 0; i < kGroup; i += 32) {
      const int64_t left = k - begin - i;
      const __m512i v = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : 0, x + begin + i);
#pragma GCC unroll 4
      for (int64_t s = 0; s < 4; ++s)
        store_raw(out + begin + 32 * s + i / 4, _mm512_cvtepi64_epi16(_mm512_srli_epi64(v, unsigned(16 * (s ^ 1)))));
    }
}

// The sums of N vectors, four at a time: less than half the instructions of one at a time.
template <int N>
SIMD_INLINE void sums(const F32* v, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 4) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 a = (__m512)v[i + 2 * j < N ? i + 2 * j : 0], b = (__m512)v[i + 2 * j + 1 < N ? i + 2 * j + 1 : 0];
      pair[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d low = (__m512d)pair[0], high = (__m512d)pair[1];
    const __m512 four = _mm512_add_ps((__m512)_mm512_unpacklo_pd(low, high), (__m512)_mm512_unpackhi_pd(low, high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
}

// out[m * kStrip + r] += x row m . w row first + r over columns [begin, stop), for kFewColumns rows of which those from
// `end` on repeat the last. kBlocks: how many blocks a group of 128 has, or 1.
template <int M, int kBlocks>
static void few_dots(const Weight4bit& w, const bf16* x, int64_t k, int64_t first, int64_t end, int64_t begin,
                     int64_t stop, float* out) {
  constexpr int R = kFewColumns<M>;
  const __m512i table = codebook_bf16(w.codebook);
  const int64_t groups = (k + kGroup - 1) / kGroup, length = groups * kGroup;
  const uint8_t* packed[R];
  int64_t origin[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    origin[r] = (first + r < end ? first + r : end - 1) * k;
    packed[r] = w.packed + origin[r] / 2;
  }
  const float* const absmax = w.absmax;
  const int shift = w.block_shift;
  F32 total[M * R] = {};
  const auto group = [&](int64_t begin, auto load_codes, auto load_scale) __attribute__((always_inline)) {
    __m512i codes[R];
    __m512 sum[M * R] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      codes[r] = load_codes(packed[r] + begin / 2);
      __builtin_prefetch(packed[r] + (begin + R * k) / 2);
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      __m512bh b[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) b[r] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes[r], 4 * s), table);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m512bh a = load_raw<__m512bh>(x + m * length + begin + 32 * s);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[m * R + r] = _mm512_dpbf16_ps(sum[m * R + r], a, b[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F32 scale = load_scale(absmax + ((origin[r] + begin) >> shift));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m * R + r] = fma((F32)sum[m * R + r], scale, total[m * R + r]);
    }
  };
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i block = kBlocks == 4 ? lanes : _mm512_srli_epi32(lanes, 1);
  const auto spread = [&](__m128 scales) __attribute__((always_inline)) {
    return (F32)_mm512_permutexvar_ps(block, _mm512_castps128_ps512(scales));
  };
  for (; begin + kGroup <= stop; begin += kGroup)
    group(
        begin, [](const uint8_t* p) __attribute__((always_inline)) { return _mm512_loadu_si512(p); },
        [&](const float* p) __attribute__((always_inline)) {
          if constexpr (kBlocks == 1) return set1(*p);
          if constexpr (kBlocks == 2) return spread(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)p)));
          return spread(_mm_loadu_ps(p));
        });
  if (begin < stop) {
    const int64_t left = stop - begin, blocks = (left * kBlocks + kGroup - 1) / kGroup;
    group(
        begin,
        [&](const uint8_t* p)
            __attribute__((always_inline)) { return _mm512_maskz_loadu_epi64((1 << left / 16) - 1, p); },
        [&](const float* p) __attribute__((always_inline)) {
          return kBlocks == 1 ? set1(*p) : spread(_mm_maskz_loadu_ps((1 << blocks) - 1, p));
        });
  }
  float all[(M * R + 3) / 4 * 4];
  sums<M * R>(total, all);
  for (int i = 0; i < M * R; ++i) out[i / R * kStrip + i % R] += all[i];
}
