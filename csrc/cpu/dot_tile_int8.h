// Exact int8 dot products of up to kTileM rows of x with up to kTileN <= W rows of w. Included after simd.h.

#if QUANTLIB_LEVEL >= 2
constexpr int kTileM = 4, kTileN = 6;
// vpdpbusd multiplies unsigned by signed bytes: w + 128 is unsigned, and 128 * (sum of the row of x) too much, which
// the caller subtracts. Intermediate wrap-around is harmless modulo 2^32.
constexpr int32_t kInt8Offset = 128;
constexpr int64_t kInt8Step = 64;
typedef __m512i I8Block;
SIMD_INLINE I8Block x_block(const int8_t* p) { return _mm512_loadu_si512(p); }
SIMD_INLINE I8Block w_block(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
SIMD_INLINE I32 dot_int8(I8Block x, I8Block w, I32 acc) { return (I32)_mm512_dpbusd_epi32((__m512i)acc, w, x); }
#elif QUANTLIB_LEVEL == 1
constexpr int kTileM = 3, kTileN = 4;
// vpmaddubsw would saturate: widen to 16 bits.
constexpr int32_t kInt8Offset = 0;
constexpr int64_t kInt8Step = 16;
typedef __m256i I8Block;
SIMD_INLINE I8Block w_block(const int8_t* p) { return _mm256_cvtepi8_epi16(load_raw<__m128i>(p)); }
SIMD_INLINE I8Block x_block(const int8_t* p) { return w_block(p); }
SIMD_INLINE I32 dot_int8(I8Block x, I8Block w, I32 acc) {
  return (I32)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(x, w));
}
#else
constexpr int kTileM = 2, kTileN = 4;
constexpr int32_t kInt8Offset = 0;
constexpr int64_t kInt8Step = W;
typedef I32 I8Block;
SIMD_INLINE I8Block w_block(const int8_t* p) { return __builtin_convertvector(load_raw<I8>(p), I32); }
SIMD_INLINE I8Block x_block(const int8_t* p) { return w_block(p); }
SIMD_INLINE I32 dot_int8(I8Block x, I8Block w, I32 acc) { return acc + x * w; }
#endif

// The last n < kInt8Step bytes of a row, zero behind.
struct Int8Tail {
  int8_t bytes[kInt8Step];

  SIMD_INLINE_MEMBER Int8Tail(const int8_t* p, int64_t n) : bytes{} { __builtin_memcpy(bytes, p, n); }
  SIMD_INLINE_MEMBER operator const int8_t*() const { return bytes; }
};

// out[r * ldo + c] = x row r . w row c + kInt8Offset * sum of x row r. What follows w is fetched to L2, in the order of
// memory.
template <int M, int N>
static void dot_tile_int8(const int8_t* x, const int8_t* w, int64_t k, int32_t* out, int64_t ldo) {
  I32 acc[M][N] = {};
  const auto step = [&](int64_t i, auto at) __attribute__((always_inline)) {
    I8Block b[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      b[c] = w_block(at(w + c * k + i));
      __builtin_prefetch(w + N * k + i * N + c * kInt8Step, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const I8Block a = x_block(at(x + r * k + i));
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) acc[r][c] = dot_int8(a, b[c], acc[r][c]);
    }
  };
  int64_t i = 0;
  for (; i + kInt8Step <= k; i += kInt8Step) step(i, [](const int8_t* p) __attribute__((always_inline)) { return p; });
  if (i < k) step(i, [&](const int8_t* p) __attribute__((always_inline)) { return Int8Tail(p, k - i); });
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) out[r * ldo + c] = sum(acc[r][c]);
}

template <int N>
static void dot_rows_int8(const int8_t* x, const int8_t* w, int64_t k, int64_t rows, int32_t* out, int64_t ldo) {
  switch (rows) {
    case 1: return dot_tile_int8<1, N>(x, w, k, out, ldo);
    case 2: return dot_tile_int8<2, N>(x, w, k, out, ldo);
    case 3: return dot_tile_int8<3, N>(x, w, k, out, ldo);
    default: return dot_tile_int8<kTileM, N>(x, w, k, out, ldo);
  }
}

static void dot_rows_int8(const int8_t* x, const int8_t* w, int64_t k, int64_t rows, int64_t columns, int32_t* out,
                          int64_t ldo) {
  if (columns == kTileN) return dot_rows_int8<kTileN>(x, w, k, rows, out, ldo);
  for (int64_t c = 0; c < columns; ++c) dot_rows_int8<1>(x, w + c * k, k, rows, out + c, ldo);
}
