// Panels that are decoded from the codes of a 4-bit weight, many at once.
// Included after few_rows_4bit.h; AVX-512 only.

// The 16-bit lanes of the low and the high half in turn.
SIMD_INLINE __m512i zip(__m512i halves) {
  const __m512i lanes = _mm512_cvtepu8_epi32(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i index = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(index, halves);
}

// W^T: the packed weight is turned, so that a lane has 8 codes of a column, then looked up, scaled and rounded. To
// scale the sums of blocks instead costs no rounding, but ends a chain every 32 steps: 256 rows took 4% longer.
struct CodePanels {
  static constexpr bool kShared = false;
  PlainWeight plain;
  int64_t k, blocks, first_column = 0;
  Scratch<float> absmaxes;  // of each panel [blocks, kColumns] and what the transpose writes beyond

  CodePanels(const Weight4bit& weight, int64_t k, int64_t first, int64_t last)
      : plain(weight, first * k, last * k),
        k(k),
        blocks(k >> weight.block_shift),
        absmaxes(3, kAbreast * (blocks + W) * kColumns) {}

  float* absmax_of(int64_t column) const { return absmaxes + (column - first_column) * (blocks + W); }
  void start(int64_t first, int64_t count) {
    first_column = first;
    for (int64_t c = 0; c < count; c += kColumns) start_panel(first + c, count - c < kColumns ? count - c : kColumns);
  }
  void start_panel(int64_t first, int64_t count) {
    float* const absmax = absmax_of(first);
    for (int64_t group = 0; group < kColumns; group += W) {
      const int64_t row = first + (group < count ? group : count - 1), last = first + count - 1 - row;
      if (blocks > 0)
        transpose(reinterpret_cast<const uint32_t*>(plain.w.absmax) + row * blocks, blocks, last, blocks,
                  reinterpret_cast<uint32_t*>(absmax) + group);
      for (int64_t i = 0; i < W && blocks == 0; ++i)
        absmax[group + i] = plain.w.absmax[(row + (i < last ? i : last)) * k >> plain.w.block_shift];
    }
  }

  void fetch_ahead(int64_t, int64_t, int64_t, int64_t, int64_t) const {}  // build() does: half as much
  template <class E>
  void build(int64_t first, int64_t count, int64_t begin, int64_t length, E* panel) const {
    alignas(64) uint32_t words[kStretch / 8 * kColumns];
    for (int64_t group = 0; group < kColumns; group += W) {
      const int64_t row = first + (group < count ? group : count - 1), last = first + count - 1 - row;
      const uint8_t* packed = plain.w.packed + (row * k + begin) / 2;
      for (int64_t i = 0; i < W; ++i) prefetch_next(plain.w, k, kColumns, row + i, begin, begin + length);
      transpose(reinterpret_cast<const uint32_t*>(packed), k / 8, last, length / 8, words + group);
    }
    const __m512 codebook = _mm512_loadu_ps(plain.w.codebook.code);
    const float* const absmax = absmax_of(first);
    const int shift = plain.w.block_shift;
    for (int64_t i = 0; i < length; i += 8)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512i codes = load_raw<__m512i>(words + i / 8 * kColumns + v * W);
        const __m512 scale = _mm512_loadu_ps(absmax + ((begin + i) >> shift) * kColumns + v * W);
        const auto weight = [&](int s) __attribute__((always_inline)) {  // the high nibble of a byte comes first
          return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, unsigned(4 * (s ^ 1))), codebook), scale);
        };
#pragma GCC unroll 8
        for (int s = 0; s < 8; s += int(kPer<E>)) {
          E* const at = panel + (i + s) * kColumns + v * W * kPer<E>;
          if constexpr (kPer<E> == 1)
            store_raw(at, weight(s));
          else
            store_raw(at, zip((__m512i)_mm512_cvtne2ps_pbh(weight(s + 1), weight(s))));
        }
      }
  }
};

#if QUANTLIB_LEVEL == 3
// W for dx, in bfloat16: rows are decoded two at once, side by side as the panel has them, by one table of 32 values,
// where the fifth bit of an index is the row. One row of dy took 0.8 ms instead of 1.6 (4096 x 4096, two threads).
struct PairPanels {
  static constexpr bool kShared = true;
  const Weight4bit& w;
  int64_t n, k;

  void start(int64_t, int64_t) const {}
  void fetch_ahead(int64_t, int64_t, int64_t, int64_t, int64_t) const {}
  void build(int64_t first, int64_t, int64_t begin, int64_t length, bf16* panel) const {
    const float* const absmax = w.absmax;
    const int shift = w.block_shift;
    const LookupTables tables(w.codebook);
    // Of every word, a byte of each row, the nibbles: high ones first.
    const __m512i nibbles = _mm512_set1_epi64(0x00080000000c0004);
    const __m512i nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi32(16 << 16);
    const uint8_t* packed = w.packed + (begin * k + first) / 2;
    for (int64_t row = begin; row < begin + length; row += 2, panel += 2 * kColumns, packed += k) {
      __builtin_prefetch(packed + 16 * k, 0, 2);
      __builtin_prefetch(packed + 16 * k + k / 2, 0, 2);
      const bool pair = row + 1 < n;
      const float low = absmax[(row * k + first) >> shift], high = pair ? absmax[((row + 1) * k + first) >> shift] : 0;
      const __m512i table = tables.flushing(low, high);
      const __m128i a = load_raw<__m128i>(packed), b = load_raw<__m128i>(packed + (pair ? k / 2 : 0));
      const __m128i words[kVectors] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512i fields = _mm512_multishift_epi64_epi8(nibbles, _mm512_cvtepu16_epi64(words[v]));
        const __m512i index = _mm512_ternarylogic_epi64(fields, nibble, second, 0xea);  // fields & nibble | second
        store_raw(panel + 2 * v * W, _mm512_permutexvar_epi16(index, table));
      }
    }
  }
};
#endif
