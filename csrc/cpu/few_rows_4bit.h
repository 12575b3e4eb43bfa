// y = x W^T for few rows of x, decoded in registers straight into the products. Included after decode_4bit.h and
// matmul.h; AVX2 and AVX-512.
//
// x is multiplied by the codebook's values and the sum over each block by its absmax, in float32: no table is filled
// per block, and nothing is rounded but the codebook where x is bfloat16 (not with AVX-512 without BF16). A sum over a
// block may be finite, infinite or NaN where the sum of products with the weights is not, if absmax is not finite or x
// is huge. The result is never finite then, so the caller looks for that and computes it anew. From kScaledRows rows of
// bfloat16 on, scaling the sums costs more than scaling the codebook of each block, once for all rows of x.

// Rows of the weight begin at a multiple of 16 bytes, and blocks do not straddle them.
static bool has_whole_blocks(const Weight4bit& w, int64_t k) {
  const int64_t block = int64_t(1) << w.block_shift;
  return k > 0 && k % 32 == 0 && (k % block == 0 || block % k == 0);
}

// The most rows of x that are multiplied by decoded codes at once.
constexpr int kFewAtOnce = 6;
// Rows of the weight in one strip, which stays in L2 until all rows of x have passed it; a multiple of what is taken at
// a time and of W.
constexpr int64_t kStrip = 48;
// Bytes of x that pass a strip at once. AVX2 loads x for each product, so it must stay in L1, of 32 KB at least:
// without this limit 4 rows took 1.08 times as long, 6 rows 1.19. AVX-512 loads it half as often and has room in L2:
// with it 4 rows took 1.12 and 6 rows 1.13 times as long out of the cache, as rows of the weight were read in parts.
constexpr int64_t kFewBytes = QUANTLIB_LEVEL >= 2 ? 256 << 10 : 24 << 10;
// Rows of the weight ahead that are fetched, to L2: in L1 they displaced x, and out of the cache 1 row took 1.14
// to 1.35 times as long (14336 x 4096, 4096 x 14336).
constexpr int64_t kFewAhead = 8;
// Codes of a row that are loaded at a time: a vector of 32-bit words. Rows of x are padded to whole groups.
constexpr int64_t kGroup = 8 * W;
static int64_t padded(int64_t k) { return (k + kGroup - 1) / kGroup * kGroup; }
// Rows of the weight at a time: independent chains of sums that share the loads of x, as far as registers go.
#if QUANTLIB_LEVEL >= 2
template <int M>
constexpr int kFewColumns = M > 3 ? 2 : 4;
#else
template <int M>
constexpr int kFewColumns = M > 2 ? 1 : 2;
#endif

// The values of a group's codes, part by part: vectors that are multiplied as E. x is put in the order in which they
// come.
template <class E>
constexpr int kLanes = W * int(kPer<E>);
template <class E>
constexpr int kParts = kGroup / kLanes<E>;
template <class E>
struct Values;

// Words shifted by 0, 4, 8 ... bits have codes 1, 0, 3, 2 ... of every lane at their bottom; lookups do not see what
// lies above. The code of a lane in a part:
constexpr int code_in_word(int part, int lane) { return 8 * lane + (part ^ 1); }

#if QUANTLIB_LEVEL >= 2
typedef __m512i Codes;
SIMD_INLINE Codes load_codes(const uint8_t* packed, int64_t count) {
  return count == kGroup ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi64((1 << count / 16) - 1, packed);
}

template <>
struct Values<float> {
  __m512 codebook;

  SIMD_INLINE_MEMBER explicit Values(const Codebook& codebook) : codebook(_mm512_loadu_ps(codebook.code)) {}
  SIMD_INLINE_MEMBER F32 operator()(Codes codes, int part) const {
    return (F32)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, unsigned(4 * part)), codebook);
  }
  static constexpr int code(int part, int lane) { return code_in_word(part, lane); }
};
#if QUANTLIB_LEVEL == 3
// vpermw looks at the low five bits of a 16-bit lane, of which four are the code: the codebook stands there twice.
template <>
struct Values<bf16> {
  __m512i codebook;

  SIMD_INLINE_MEMBER explicit Values(const Codebook& c)
      : codebook((__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(c.code), _mm512_loadu_ps(c.code))) {}
  SIMD_INLINE_MEMBER F32 operator()(Codes codes, int part) const {
    return (F32)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, unsigned(4 * part)), codebook);
  }
};
#endif

// The scales of a group of kBlocks blocks, `count` codes of it, by lanes.
template <int kBlocks>
SIMD_INLINE F32 load_scales(const float* absmax, int64_t count) {
  if (kBlocks == 1) return set1(*absmax);
  const __m512i fours = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i block = kBlocks == 4 ? fours : _mm512_srli_epi32(fours, 1);
  const __mmask8 some = (1 << (count * kBlocks + kGroup - 1) / kGroup) - 1;
  const __m128 scales = count < kGroup ? _mm_maskz_loadu_ps(some, absmax)
                        : kBlocks == 4 ? _mm_loadu_ps(absmax)
                                       : _mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)absmax));
  return (F32)_mm512_permutexvar_ps(block, _mm512_castps128_ps512(scales));
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
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __builtin_memcpy(out + i, &all, sizeof(float) * (N - i < 4 ? N - i : 4));
  }
}
#else
typedef __m256i Codes;
SIMD_INLINE Codes load_codes(const uint8_t* packed, int64_t count) {
  return count == kGroup ? load_raw<__m256i>(packed) : _mm256_zextsi128_si256(load_raw<__m128i>(packed));
}

template <>
struct Values<float> {
  FloatTable codebook;

  SIMD_INLINE_MEMBER explicit Values(const Codebook& c)
      : codebook{_mm256_loadu_ps(c.code), _mm256_loadu_ps(c.code + 8)} {}
  SIMD_INLINE_MEMBER F32 operator()(Codes codes, int part) const {
    return lookup8(_mm256_srli_epi32(codes, 4 * part), codebook);
  }
  static constexpr int code(int part, int lane) { return code_in_word(part, lane); }
};

// A bfloat16 to be multiplied as a float.
struct WideBf16 {
  float value;
};
// The codebook is rounded to bfloat16, so that two lookups of 32 bytes, of the nibbles as they lie, give 32 values. Of
// floats 8 are looked up twice, which took 1.3 to 1.5 times as long for 1 row of x.
template <>
struct Values<WideBf16> {
  __m256i low, high;  // bytes of the codebook, in both halves

  SIMD_INLINE_MEMBER explicit Values(const Codebook& c) {
    bf16 rounded[16];
    store(rounded, load(c.code));
    store(rounded + 8, load(c.code + 8));
    const __m256i words = load_raw<__m256i>(rounded);
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)), _mm256_srli_epi16(words, 8));
    low = _mm256_permute4x64_epi64(bytes, 0x88);
    high = _mm256_permute4x64_epi64(bytes, 0xdd);
  }
  SIMD_INLINE_MEMBER F32 operator()(Codes codes, int part) const {
    const __m256i nibbles = _mm256_and_si256(part < 4 ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
    const __m256i a = _mm256_shuffle_epi8(low, nibbles), b = _mm256_shuffle_epi8(high, nibbles);
    const __m256i values = part % 4 < 2 ? _mm256_unpacklo_epi8(a, b) : _mm256_unpackhi_epi8(a, b);
    return (F32)(part % 2 ? _mm256_and_si256(values, _mm256_set1_epi32(int(0xffff0000)))
                          : _mm256_slli_epi32(values, 16));
  }
  // Of the high nibbles and then the low ones, bytes 0 to 7 of each half and then 8 to 15, even ones and then odd ones.
  static constexpr int code(int part, int lane) {
    return 2 * (16 * (lane / 4) + 8 * (part / 2 % 2) + 2 * (lane % 4) + part % 2) + part / 4;
  }
};

template <int kBlocks>
SIMD_INLINE F32 load_scales(const float* absmax, int64_t count) {
  if (kBlocks == 1 || count < kGroup) return set1(*absmax);
  return (F32)_mm256_set_m128(_mm_set1_ps(absmax[1]), _mm_set1_ps(absmax[0]));
}

template <int N>
SIMD_INLINE void sums(const F32* v, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) out[i] = sum(v[i]);
}
#endif

template <class T, class E>
static void put_in_order(const T* x, int64_t k, E* out) {
  for (int64_t begin = 0; begin < k; begin += kGroup, out += kGroup) {
    float group[kGroup] = {};
    convert(x + begin, k - begin < kGroup ? k - begin : kGroup, group);
    for (int i = 0; i < kGroup; ++i) out[i] = {group[Values<E>::code(i / W, i % W)]};
  }
}
#if QUANTLIB_LEVEL == 3
static void put_in_order(const bf16* x, int64_t k, bf16* out) {
  for (int64_t begin = 0; begin < k; begin += kGroup)
    for (int64_t i = 0; i < kGroup; i += 32) {
      const int64_t left = k - begin - i;
      const __m512i v = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : 0, x + begin + i);
#pragma GCC unroll 4
      for (int64_t s = 0; s < 4; ++s)
        store_raw(out + begin + 32 * s + i / 4, _mm512_cvtepi64_epi16(_mm512_srli_epi64(v, unsigned(16 * (s ^ 1)))));
    }
}
#endif

// Rows first ... first + R of the weight; those from `end` on repeat the last.
template <int R>
struct FewRows {
  const uint8_t* packed[R];
  int64_t origin[R];
  const uint8_t* ahead;
  int64_t ahead_row, ahead_columns;

  // whole: they are read to their ends before the next, and are fetched in the order of memory.
  SIMD_INLINE_MEMBER FewRows(const Weight4bit& w, int64_t k, int64_t first, int64_t end, bool whole)
      : ahead(w.packed + (first + kFewAhead) * k / 2), ahead_row(whole ? 64 : k / 2), ahead_columns(whole ? R : 1) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      origin[r] = (first + r < end ? first + r : end - 1) * k;
      packed[r] = w.packed + origin[r] / 2;
    }
  }
  SIMD_INLINE_MEMBER void fetch_ahead(int64_t begin, int r) const {
    __builtin_prefetch(ahead + begin / 2 * ahead_columns + r * ahead_row, 0, 2);
  }
};

// out[m * kStrip + r] += total of row m of x and row r of the weight.
template <int M, int R>
SIMD_INLINE void add_totals(const F32* total, float* out) {
  float all[M * R];
  sums<M * R>(total, all);
#pragma GCC unroll 18
  for (int i = 0; i < M * R; ++i) out[i / R * kStrip + i % R] += all[i];
}

// acc + x w, by lanes.
template <class E>
SIMD_INLINE F32 add_products(F32 x, F32 w, F32 acc) {
#if QUANTLIB_LEVEL == 3
  if constexpr (__is_same(E, bf16)) return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#endif
  return fma(x, w, acc);
}

// sums[m * R + r] += x row m . `count` codes from column `begin` of row r of the weight; their values are
// value(r, codes, part), and between(part) comes before the products of a part.
template <int M, int R, class E, class Value, class Between>
SIMD_INLINE void add_group(const FewRows<R>& rows, const E* x, int64_t length, int64_t begin, int64_t count,
                           const Value& value, const Between& between, F32* sums) {
  Codes codes[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    codes[r] = load_codes(rows.packed[r] + begin / 2, count);
    rows.fetch_ahead(begin, r);
  }
#pragma GCC unroll 8
  for (int part = 0; part < kParts<E>; ++part) {
    F32 b[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) b[r] = value(r, codes[r], part);
    between(part);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const F32 a = load_raw<F32>(x + m * length + begin + kLanes<E> * part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[m * R + r] = add_products<E>(a, b[r], sums[m * R + r]);
    }
  }
}

// out[m * kStrip + r] += x row m . w row first + r over columns [begin, stop); begin is a multiple of kGroup. kBlocks:
// how many blocks a group has, or 1.
template <int M, int kBlocks, class E>
static void few_dots(const Weight4bit& w, const E* x, int64_t k, int64_t first, int64_t end, int64_t begin,
                     int64_t stop, float* out) {
  constexpr int R = kFewColumns<M>;
  const Values<E> values(w.codebook);
  const FewRows<R> rows(w, k, first, end, begin == 0 && stop == k);
  const int64_t length = padded(k);
  const float* const absmax = w.absmax;
  const int shift = w.block_shift;
  F32 total[M * R] = {};
  const auto group = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    F32 sum[M * R] = {};
    add_group<M, R>(
        rows, x, length, begin, count,
        [&](int, Codes codes, int part) __attribute__((always_inline)) { return values(codes, part); },
        [](int) __attribute__((always_inline)) {}, sum);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F32 scale = load_scales<kBlocks>(absmax + ((rows.origin[r] + begin) >> shift), count);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m * R + r] = fma(sum[m * R + r], scale, total[m * R + r]);
    }
  };
  for (; begin + kGroup <= stop; begin += kGroup) group(begin, kGroup);
  if (begin < stop) group(begin, stop - begin);
  add_totals<M, R>(total, out);
}

#if QUANTLIB_LEVEL == 3
// Rows of x from which the codebook is scaled, and rows of the weight at a time then.
constexpr int kScaledRows = 4, kScaledColumns = 3;

// The same for bfloat16 and blocks of 64 and more, each of which has its own table: the codebook times absmax, rounded
// to bfloat16 as dequantize_4bit rounds. A group of 128 has kBlocks blocks, side by side in one table, where the fifth
// bit of an index is the block. Tables are made a group ahead: made when they were wanted, 4 rows took 1.10 and 6
// rows 1.14 times as long in L1, no less than scaling sums.
template <int M, int kBlocks>
static void few_scaled_dots(const Weight4bit& w, const bf16* x, int64_t k, int64_t first, int64_t end, int64_t begin,
                            int64_t stop, float* out) {
  constexpr int R = kScaledColumns;
  const LookupTables tables(w.codebook);
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const FewRows<R> rows(w, k, first, end, begin == 0 && stop == k);
  const int64_t length = padded(k);
  const float* const absmax = w.absmax;
  const int shift = w.block_shift;
  const auto table_of = [&](int r, int64_t begin) __attribute__((always_inline)) {
    const float* const scale = absmax + ((rows.origin[r] + begin) >> shift);
    return tables.flushing(*scale, scale[kBlocks == 2 && begin + 64 < stop ? 1 : 0]);
  };
  F32 total[M * R] = {};
  __m512i table[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) table[r] = table_of(r, begin);
  const auto group = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    const int64_t next = begin + kGroup < stop ? begin + kGroup : begin;
    __m512i next_table[R];
    add_group<M, R>(
        rows, x, length, begin, count,
        [&](int r, Codes codes, int part) __attribute__((always_inline)) {
          __m512i index = _mm512_srli_epi16(codes, unsigned(4 * part));
          if (kBlocks == 2) index = _mm512_ternarylogic_epi64(index, nibble, second, 0xea);  // index & nibble | second
          return (F32)_mm512_permutexvar_epi16(index, table[r]);
        },
        [&](int part) __attribute__((always_inline)) {
          if (part < R) next_table[part] = table_of(part, next);
        },
        total);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) table[r] = next_table[r];
  };
  for (; begin + kGroup <= stop; begin += kGroup) group(begin, kGroup);
  if (begin < stop) group(begin, stop - begin);
  add_totals<M, R>(total, out);
}
#endif

// Rows [first, last) of the weight.
template <int M, class E>
static void strip_dots(const Weight4bit& w, const E* x, int64_t k, int64_t first, int64_t last, int64_t begin,
                       int64_t stop, float* out) {
  const auto each = [&](auto dots, int64_t columns) {
    for (int64_t n = first; n < last; n += columns) dots(w, x, k, n, last, begin, stop, out + n - first);
  };
  const int64_t block = int64_t(1) << w.block_shift;
  const int64_t blocks = block < kGroup && block <= k ? kGroup / block : 1;
#if QUANTLIB_LEVEL == 3
  if constexpr (__is_same(E, bf16) && M >= kScaledRows)
    if (blocks < 4) return each(blocks == 2 ? few_scaled_dots<M, 2> : few_scaled_dots<M, 1>, kScaledColumns);
#endif
#if QUANTLIB_LEVEL >= 2
  if (blocks == 4) return each(few_dots<M, 4, E>, kFewColumns<M>);
#endif
  each(blocks == 2 ? few_dots<M, 2, E> : few_dots<M, 1, E>, kFewColumns<M>);
}

// `rows` <= M rows of x, put in order, times rows [first, last) of the weight, kStrip at most: rows m and on of y.
// Returns whether all is finite.
template <class T, class E, int M = kFewAtOnce>
static bool few_rows(const Product& p, const Weight4bit& w, const E* x, int64_t m, int64_t rows, int64_t first,
                     int64_t last) {
  if constexpr (M > 1)
    if (rows < M) return few_rows<T, E, M - 1>(p, w, x, m, rows, first, last);
  float sums[M * kStrip] = {};
  const int64_t stretches = (p.depth * M * int64_t(sizeof(E)) + kFewBytes - 1) / kFewBytes;
  const int64_t depth = padded(p.depth / stretches);
  for (int64_t k = 0; k < p.depth; k += depth)
    strip_dots<M>(w, x, p.depth, first, last, k, k + depth < p.depth ? k + depth : p.depth, sums);
  I32 odd = {};
  for (int i = 0; i < M * kStrip; i += W) odd |= magnitude(load(sums + i)) >= kInf;
  finish<T>(p, sums, kStrip, m, M, first, last - first);
  return !any(odd);
}

// y = x W^T + bias, x and y of type T, multiplied as E. Returns whether all is finite.
template <class E, class T>
static bool few_rows(const Product& p, const Weight4bit& weight) {
  const int64_t length = padded(p.depth);
  const int64_t passes = (p.m + kFewAtOnce - 1) / kFewAtOnce;
  const Scratch<E> x(1, p.m * length);
  parallel_for(p.m, 16384 / p.depth + 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      put_in_order(static_cast<const T*>(p.x) + m * p.depth, p.depth, x + m * length);
  });
  bool finite = true;
  parallel_for((p.columns + 3) / 4, 16384 / p.depth + 1, [&](int64_t begin, int64_t end) {
    const int64_t last = end * 4 < p.columns ? end * 4 : p.columns;
    for (int64_t n = begin * 4; n < last; n += kStrip) {
      const int64_t stop = n + kStrip < last ? n + kStrip : last;
      const PlainWeight plain(weight, n * p.depth, stop * p.depth);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t m = p.m * pass / passes, rows = p.m * (pass + 1) / passes - m;
        if (!few_rows<T, E>(p, plain.w, x + m * length, m, rows, n, stop))
          __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      }
    }
  });
  return finite;
}
