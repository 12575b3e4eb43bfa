// Dot products of kTileM rows of x with kTileN rows of w, all contiguous along k: the inner loop of the linear ops.
// Included per instruction set after simd.h. Accumulators run along k and are summed in a fixed order at the end,
// so results do not depend on the number of threads.

#if QUANTLIB_LEVEL == 2
constexpr int kTileM = 4, kTileN = 6;
constexpr int64_t kPanel = 24;
#elif QUANTLIB_LEVEL == 1
constexpr int kTileM = 3, kTileN = 4;
constexpr int64_t kPanel = 16;
#else
constexpr int kTileM = 2, kTileN = 4;
constexpr int64_t kPanel = 16;
#endif

template <class E>
constexpr int64_t dot_step() {
  return W * 4 / int64_t(sizeof(E));
}

SIMD_INLINE F32 dot_vector(const float* p) { return load(p); }
SIMD_INLINE F32 dot(F32 x, F32 w, F32 acc) { return fma(x, w, acc); }
#if QUANTLIB_LEVEL == 2
SIMD_INLINE __m512bh dot_vector(const bf16* p) { return load_raw<__m512bh>(p); }
SIMD_INLINE F32 dot(__m512bh x, __m512bh w, F32 acc) { return (F32)_mm512_dpbf16_ps((__m512)acc, x, w); }
#endif

// Sums longer than this many vectors are cut, or float32's rounding would exceed that of a blocked matmul.
constexpr int64_t kChain = 256;

// out[i * ldo + j] = x row i . w row j, k a multiple of dot_step.
template <int M, class E>
static void dot_tile(const E* x, int64_t ldx, const E* w, int64_t ldw, int64_t k, float* out, int64_t ldo) {
  int64_t i = 0;
  do {
    const int64_t stop = k - i < kChain * dot_step<E>() ? k : i + kChain * dot_step<E>();
    const bool first = i == 0;
    F32 acc[M][kTileN] = {};
    for (; i < stop; i += dot_step<E>()) {
      decltype(dot_vector(x)) b[kTileN];
#pragma GCC unroll 8
      for (int c = 0; c < kTileN; ++c) b[c] = dot_vector(w + c * ldw + i);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        const auto a = dot_vector(x + r * ldx + i);
#pragma GCC unroll 8
        for (int c = 0; c < kTileN; ++c) acc[r][c] = dot(a, b[c], acc[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kTileN; ++c) out[r * ldo + c] = sum(acc[r][c]) + (first ? 0.0f : out[r * ldo + c]);
  } while (i < k);
}

template <class E>
static void dot_rows(const E* x, int64_t ldx, const E* w, int64_t ldw, int64_t k, int64_t rows, float* out,
                     int64_t ldo) {
  switch (rows) {
    case 1: return dot_tile<1>(x, ldx, w, ldw, k, out, ldo);
    case 2: return dot_tile<2>(x, ldx, w, ldw, k, out, ldo);
    case 3: return dot_tile<3>(x, ldx, w, ldw, k, out, ldo);
    default: return dot_tile<kTileM>(x, ldx, w, ldw, k, out, ldo);
  }
}
