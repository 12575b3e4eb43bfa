// Panels that are decoded from the codes of a 4-bit weight, many at once.
// Included after few_rows_4bit.h; AVX-512 only.

#if QUANTLIB_LEVEL == 3
// Looks up, scales and rounds the codes of a panel: for every 8 steps, columns of 16 codes side by side, of which step
// i takes code i and code i + 8. Two neighbouring floats are then of one column, and converting two vectors of them to
// one of bfloat16 leaves every pair in its place. absmax is laid out alike.
struct DecodeTurned {
  const uint64_t* codes;
  const float* absmax;
  int block_shift;
  __m512 codebook;
  bf16* panel;

  SIMD_INLINE_MEMBER void operator()(int64_t step, F32* w) const {
    const uint64_t* const words = codes + step / 8 * kColumns;
    const float* const scales = absmax + (step / 8 * 16 >> block_shift) * 2 * kColumns;
    const __m512i bits = _mm512_set1_epi32(int(4 * (step % 8)));
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __m512 half[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int column = v * W + i * 8;
        const __m512i index = _mm512_srlv_epi32(_mm512_load_si512(words + column), bits);
        half[i] = _mm512_mul_ps(_mm512_permutexvar_ps(index, codebook), _mm512_load_ps(scales + 2 * column));
      }
      w[v] = (F32)_mm512_cvtne2ps_pbh(half[1], half[0]);
      store_raw(panel + 2 * (step * kColumns + v * W), w[v]);
    }
  }
};
#endif

// W^T: the packed weight is turned, so that a lane has the codes of a column, then looked up, scaled and rounded;
// floats at once, since a step ahead of their products 7 and 12 rows took 1.08 times as long. To scale the sums of
// blocks instead costs no rounding, but ends a chain every 32 steps: 256 rows took 4% longer.
struct CodePanels : AnyPanels {
  PlainWeight plain;
  int64_t k, blocks, first_column = 0;
  Scratch<float> absmaxes;  // of each panel [blocks, kColumns] and what the transpose writes beyond
#if QUANTLIB_LEVEL == 3
  alignas(64) uint64_t codes[kStretch / 16 * kColumns];
  alignas(64) float scales[kStretch / 32 * 2 * kColumns];  // of blocks of 32 and more
#endif

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
                  reinterpret_cast<uint32_t*>(absmax) + group, kColumns);
      for (int64_t i = 0; i < W && blocks == 0; ++i)
        absmax[group + i] = plain.w.absmax[(row + (i < last ? i : last)) * k >> plain.w.block_shift];
    }
  }

  void fetch(int64_t first, int64_t begin, int64_t from, int64_t to) const {
    for (int64_t c = first + from; c < first + to; ++c)
      prefetch_codes(plain.w, c * k + begin, c * k + begin + kStretch);
  }

  Stored<float> build(int64_t first, int64_t count, int64_t begin, int64_t length, float* panel) const {
    alignas(64) uint32_t words[kStretch / 8 * kColumns];
    for (int64_t group = 0; group < kColumns; group += W) {
      const int64_t row = first + (group < count ? group : count - 1), last = first + count - 1 - row;
      const uint8_t* packed = plain.w.packed + (row * k + begin) / 2;
      transpose(reinterpret_cast<const uint32_t*>(packed), k / 8, last, length / 8, words + group, kColumns);
    }
    const __m512 codebook = _mm512_loadu_ps(plain.w.codebook.code);
    const float* const absmax = absmax_of(first);
    for (int64_t i = 0; i < length; i += 8)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512i codes = load_raw<__m512i>(words + i / 8 * kColumns + v * W);
        const __m512 scale = _mm512_loadu_ps(absmax + ((begin + i) >> plain.w.block_shift) * kColumns + v * W);
#pragma GCC unroll 8
        for (int s = 0; s < 8; ++s) {  // the high nibble of a byte comes first
          const __m512i index = _mm512_srli_epi32(codes, unsigned(4 * (s ^ 1)));
          store_raw(panel + (i + s) * kColumns + v * W, _mm512_mul_ps(_mm512_permutexvar_ps(index, codebook), scale));
        }
      }
    return {panel};
  }

#if QUANTLIB_LEVEL == 3
  DecodedSteps<DecodeTurned> build(int64_t first, int64_t count, int64_t begin, int64_t length, bf16* panel) {
    for (int64_t group = 0; group < kColumns; group += 8) {
      const int64_t row = first + (group < count ? group : count - 1), last = first + count - 1 - row;
      transpose64(plain.w.packed + (row * k + begin) / 2, k / 2, last, length / 16, codes + group, kColumns);
    }
    const int shift = plain.w.block_shift;
    const float* const absmax = absmax_of(first) + (begin >> shift) * kColumns;
    for (int64_t i = 0; i < (((length - 1) >> shift) + 1) * kColumns; i += 8) {
      const __m512i v = _mm512_cvtepu32_epi64(load_raw<__m256i>(absmax + i));
      store_raw(scales + 2 * i, _mm512_or_si512(v, _mm512_slli_epi64(v, 32)));
    }
    return {{codes, scales, shift, _mm512_loadu_ps(plain.w.codebook.code), panel}, length / 2 - 1, {}};
  }
  // The nibbles of a word are codes 1, 0, 3, 2, ...
  using AnyPanels::put_in_order;
  static void put_in_order(int64_t length, bf16* x) {
    const __m512i pairs = _mm512_setr_epi32(0x90001, 0x80000, 0xb0003, 0xa0002, 0xd0005, 0xc0004, 0xf0007, 0xe0006,  //
                                            0x190011, 0x180010, 0x1b0013, 0x1a0012,                                  //
                                            0x1d0015, 0x1c0014, 0x1f0017, 0x1e0016);
    for (int64_t i = 0; i < length; i += 32)
      store_raw(x + i, _mm512_permutexvar_epi16(pairs, load_raw<__m512i>(x + i)));
  }
#endif
};

#if QUANTLIB_LEVEL == 3
// W for dx, in bfloat16: rows are decoded two at once, side by side as the panel has them, by one table of 32 values,
// where the fifth bit of an index is the row.
struct DecodePairs {
  const uint8_t* packed;
  const float* absmax;
  int64_t k, first, begin, n;
  int block_shift;
  LookupTables tables;
  bf16* panel;

  SIMD_INLINE_MEMBER void operator()(int64_t i, F32* w) const {
    const __m512i nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi32(16 << 16);
    const int64_t row = begin + 2 * i, at = row * k + first, next = row + 1 < n ? k : 0;
    __builtin_prefetch(packed + (at + 32 * k) / 2, 0, 2);
    __builtin_prefetch(packed + (at + 33 * k) / 2, 0, 2);
    const float low = absmax[at >> block_shift], high = next ? absmax[(at + k) >> block_shift] : 0;
    const __m512i table = tables.flushing(low, high);
    const __m128i a = load_raw<__m128i>(packed + at / 2), b = load_raw<__m128i>(packed + (at + next) / 2);
    const __m128i words[kVectors] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      // Of every word, a byte of each row, the nibbles: high ones first.
      const __m512i fields = shifted_words(words[v], 0x00080000000c0004);
      const __m512i index = _mm512_ternarylogic_epi64(fields, nibble, second, 0xea);  // fields & nibble | second
      w[v] = (F32)_mm512_permutexvar_epi16(index, table);
      store_raw(panel + 2 * (i * kColumns + v * W), w[v]);
    }
  }
};

struct PairPanels : AnyPanels {
  static constexpr bool kShared = true;
  const Weight4bit& w;
  int64_t n, k;
  PairPanels(const Weight4bit& w, int64_t n, int64_t k) : w(w), n(n), k(k) {}

  DecodedSteps<DecodePairs> build(int64_t first, int64_t, int64_t begin, int64_t length, bf16* panel) const {
    return {
        {w.packed, w.absmax, k, first, begin, n, w.block_shift, LookupTables(w.codebook), panel}, (length - 1) / 2, {}};
  }
};
#endif
