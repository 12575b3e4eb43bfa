// Decodes any range of a 4-bit weight, in its own order. Included per instruction set after simd.h.
//
// A block's 16 possible values dtype(code * absmax) are computed first, one rounding each, so that decoding is a
// table lookup for every dtype and exact by construction.

#if QUANTLIB_LEVEL == 3
// Looks up 64 bytes in a table of 256 floats: vpermi2b looks up in 128 bytes, so each of a float's four bytes takes two
// of them and a blend, and unpacking puts the bytes together. A quarter of the time of 64 loads.
struct NestedCodebook {
  __m512i planes[4][4];  // byte p of all floats, in order

  SIMD_INLINE_MEMBER explicit NestedCodebook(const float* codebook) {
    alignas(64) uint8_t bytes[4][256];
    for (int i = 0; i < 256; i += 16)
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p)
        store_raw(bytes[p] + i,
                  _mm512_cvtepi32_epi8(_mm512_srli_epi32(_mm512_loadu_si512(codebook + i), unsigned(8 * p))));
    __builtin_memcpy(planes, bytes, sizeof(planes));
  }
  // out[i] = codebook[codes[i]] * absmax + offset, in two roundings.
  SIMD_INLINE_MEMBER void operator()(const uint8_t* codes, F32 absmax, F32 offset, float* out) const {
    // Unpacking interleaves within lanes of 16 bytes: this order of the codes makes the floats come out in theirs.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i byte[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
      byte[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(planes[p][0], index, planes[p][1]),
                                       _mm512_permutex2var_epi8(planes[p][2], index, planes[p][3]));
    const __m512i low[2] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1])};
    const __m512i high[2] = {_mm512_unpacklo_epi8(byte[2], byte[3]), _mm512_unpackhi_epi8(byte[2], byte[3])};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      store(out + 32 * i, (F32)_mm512_unpacklo_epi16(low[i], high[i]) * absmax + offset);
      store(out + 32 * i + 16, (F32)_mm512_unpackhi_epi16(low[i], high[i]) * absmax + offset);
    }
  }
};
#else
struct NestedCodebook {
  const float* codebook;

  SIMD_INLINE_MEMBER void operator()(const uint8_t* codes, F32 absmax, F32 offset, float* out) const {
    for (int i = 0; i < 64; i += W) {
      float looked_up[W];
#pragma GCC unroll 8
      for (int j = 0; j < W; ++j) looked_up[j] = codebook[codes[i + j]];
      store(out + i, load(looked_up) * absmax + offset);
    }
  }
};
#endif

// Undoes double quant for groups [first, last) of 256 blocks.
static void undo_double_quant(const Weight4bit& w, int64_t blocks, int64_t first, int64_t last, float* scales) {
  const float offset = w.offset;
  const NestedCodebook lookup{w.nested_codebook};
  for (int64_t group = first; group < last; ++group) {
    const float absmax = w.nested_absmax[group];
    const int64_t end = (group + 1) * 256 < blocks ? (group + 1) * 256 : blocks;
    int64_t i = group * 256;
    for (; i + 64 <= end; i += 64) lookup(w.absmax_codes + i, set1(absmax), set1(offset), scales + i);
    for (; i < end; ++i) scales[i] = w.nested_codebook[w.absmax_codes[i]] * absmax + offset;
  }
}

// Elements [begin, end) of a weight without double quant: undone for a whole stretch at once, since one block at a
// time took longer than decoding the block's 64 weights. Uses this thread's scratch buffer 6.
struct PlainWeight {
  Scratch<float> scales;
  Weight4bit w;

  PlainWeight(const Weight4bit& weight, int64_t begin, int64_t end)
      : scales(6, weight.absmax ? 0 : ((end - begin) >> weight.block_shift) + 1024), w(weight) {
    if (weight.absmax || begin == end) return;
    const int64_t blocks = (end + (int64_t(1) << weight.block_shift) - 1) >> weight.block_shift;
    const int64_t group = (begin >> weight.block_shift) / 256;
    float* const origin = scales - group * 256;
    undo_double_quant(weight, blocks, group, (blocks + 255) / 256, origin);
    w.absmax = origin;
  }
};

// Nibble of element i, high nibble first.
SIMD_INLINE int nibble(const uint8_t* packed, int64_t i) { return packed[i >> 1] >> (i & 1 ? 0 : 4) & 15; }

template <class T>
struct Table {
  T value[16];
};

template <class T>
SIMD_INLINE void fill(Table<T>& table, const Codebook& codebook, float scale) {
  for (int i = 0; i < 16; ++i) narrow(codebook.code[i] * scale, &table.value[i]);
}

#if QUANTLIB_LEVEL >= 2
// Codes are moved to the bottom of the lanes of an index, in order; what lies above them does not matter. vpermw looks
// up 32 16-bit values by the low five bits of each lane; with the 16 values stored twice the fifth bit does not matter
// either. vpermps does the same for 16 floats.

// Each of 8 words in four lanes of 16 bits, shifted right by the four 16-bit fields of `shifts`.
SIMD_INLINE __m512i shifted_words(__m128i words, int64_t shifts) {
  const __m512i fours = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                                              4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7));
  return _mm512_srlv_epi16(_mm512_permutexvar_epi16(fours, _mm512_castsi128_si512(words)), _mm512_set1_epi64(shifts));
}
#if QUANTLIB_LEVEL == 3
SIMD_INLINE __m512i codes32(const uint8_t* packed) {  // in 16-bit lanes
  const __m512i shifts = _mm512_set1_epi64(0x3f083f0c3f003f04);
  return _mm512_multishift_epi64_epi8(shifts, _mm512_cvtepu16_epi64(load_raw<__m128i>(packed)));
}
SIMD_INLINE __m512i codes16(const uint8_t* packed) {  // in 32-bit lanes
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 36, 32, 44, 40, 52, 48, 60, 56);
  return _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(load_raw<int64_t>(packed)));
}
#else
SIMD_INLINE __m512i codes32(const uint8_t* packed) {
  return shifted_words(load_raw<__m128i>(packed), 0x0008000c00000004);
}
SIMD_INLINE __m512i codes16(const uint8_t* packed) {
  const __m512i eights = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)packed));
  return _mm512_srlv_epi32(_mm512_permutexvar_epi32(eights, words), shifts);
}
#endif

struct LookupTables {
  __m512 codes;

  SIMD_INLINE_MEMBER explicit LookupTables(const Codebook& codebook) : codes(_mm512_loadu_ps(codebook.code)) {}
#if QUANTLIB_LEVEL == 3
  // Two tables of bfloat16, side by side. Subnormal values become zero, as they are for vdpbf16ps anyway.
  SIMD_INLINE_MEMBER __m512i flushing(float low, float high) const {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(high)),
                                        _mm512_mul_ps(codes, _mm512_set1_ps(low)));
  }
#endif
  SIMD_INLINE_MEMBER __m512i operator()(float scale, const bf16*) const {
#if QUANTLIB_LEVEL == 3
    if (__builtin_expect(!(__builtin_fabsf(scale) < 0x1p-100f), 1)) return flushing(scale, scale);
#endif
    bf16 table[16];
    store(table, (F32)codes * set1(scale));
    return _mm512_broadcast_i64x4(load_raw<__m256i>(table));
  }
  SIMD_INLINE_MEMBER __m512i operator()(float scale, const f16*) const {
    const __m512 values = _mm512_mul_ps(codes, _mm512_set1_ps(scale));
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  }
  SIMD_INLINE_MEMBER __m512i operator()(float scale, const float*) const {
    return (__m512i)_mm512_mul_ps(codes, _mm512_set1_ps(scale));
  }
};
template <class T>
SIMD_INLINE __m512i lookup_table(const Codebook& codebook, float scale, const T* out) {
  return LookupTables(codebook)(scale, out);
}
template <class T>
SIMD_INLINE void decode32(const uint8_t* packed, __m512i table, T* out) {
  store_raw(out, _mm512_permutexvar_epi16(codes32(packed), table));
}
SIMD_INLINE void decode32(const uint8_t* packed, __m512i table, float* out) {
  for (int half = 0; half < 2; ++half)
    store_raw(out + 16 * half, _mm512_permutexvar_epi32(codes16(packed + 8 * half), table));
}
#elif QUANTLIB_LEVEL == 1
// AVX2 permutes eight floats at most: look up in both halves, choose by the nibble's top bit.
struct FloatTable {
  __m256 low, high;
};
template <class T>
SIMD_INLINE FloatTable lookup_table(const Codebook& codebook, float scale, const T*) {
  const __m256 s = _mm256_set1_ps(scale);
  return {_mm256_mul_ps(_mm256_loadu_ps(codebook.code), s), _mm256_mul_ps(_mm256_loadu_ps(codebook.code + 8), s)};
}
SIMD_INLINE F32 lookup8(__m256i index, const FloatTable& table) {
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
  const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
  return (F32)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(index, 28));
}
SIMD_INLINE F32 lookup8(const uint8_t* packed, const FloatTable& table) {
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  return lookup8(_mm256_srlv_epi32(_mm256_set1_epi32(load_raw<int32_t>(packed)), shifts), table);
}
template <class T>
SIMD_INLINE void decode32(const uint8_t* packed, const FloatTable& table, T* out) {
  for (int i = 0; i < 4; ++i) store(out + 8 * i, lookup8(packed + 4 * i, table));
}
#else
template <class T>
SIMD_INLINE Table<T> lookup_table(const Codebook& codebook, float scale, const T*) {
  Table<T> table;
  fill(table, codebook, scale);
  return table;
}
template <class T>
SIMD_INLINE void decode32(const uint8_t* packed, const Table<T>& table, T* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = table.value[packed[i] >> 4];
    out[2 * i + 1] = table.value[packed[i] & 15];
  }
}
#endif

// Fetches elements [begin, end) of the flat weight to L2; harmless beyond its end.
SIMD_INLINE void prefetch_codes(const Weight4bit& w, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 128) __builtin_prefetch(w.packed + i / 2, 0, 2);
}

// Where elements begin that can be looked up together. A panel of dx has 16 columns on AVX2.
constexpr int64_t kLookedUp = QUANTLIB_LEVEL == 1 ? 8 : 32;

// Elements [begin, end) of the flat weight, which may begin at an odd nibble and straddle blocks.
template <class T>
static void decode(const Weight4bit& w, int64_t begin, int64_t end, T* out) {
  out -= begin;
  int64_t i = begin;
#if QUANTLIB_LEVEL >= 2
  // Whole blocks of 64, by far the most usual, from local copies: the compiler must assume that writing to out
  // changes w, and reloading it doubled the time.
  if (w.block_shift == 6 && w.absmax && begin % 64 == 0) {
    const float* const absmax = w.absmax;
    const uint8_t* const packed = w.packed;
    const LookupTables tables(w.codebook);
    for (; i + 64 <= end; i += 64) {
      const __m512i table = tables(absmax[i / 64], out);
      decode32(packed + i / 2, table, out + i);
      decode32(packed + i / 2 + 16, table, out + i + 32);
    }
  }
#endif
  while (i < end) {
    const int64_t block = i >> w.block_shift;
    const int64_t block_end = (block + 1) << w.block_shift;
    const int64_t stop = block_end < end ? block_end : end;
    const float scale = w.scale(block);
    if (i % kLookedUp == 0) {
      const auto table = lookup_table(w.codebook, scale, out);
      for (; i + 32 <= stop; i += 32) decode32(w.packed + i / 2, table, out + i);
#if QUANTLIB_LEVEL == 1
      for (; i + 8 <= stop; i += 8) store(out + i, lookup8(w.packed + i / 2, table));
#endif
    }
    if (i < stop) {
      Table<T> table;
      fill(table, w.codebook, scale);
      const int64_t aligned = (i + kLookedUp - 1) / kLookedUp * kLookedUp;
      const int64_t pause = i % kLookedUp && aligned < stop ? aligned : stop;
      for (; i < pause; ++i) out[i] = table.value[nibble(w.packed, i)];
    }
  }
}
