// Panels of the codes of a 4-bit weight, which are decoded into them, or on the way from them to the products.
// Included after few_rows_4bit.h; AVX-512 only.

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
