// Tiles of x times panels of the weight, in registers. Included per instruction set after simd.h.
//
// The unit is a 32-bit lane holding one float, two bfloat16 or up to four integers (Int) that are neighbours along the
// contraction. Floats are summed in float32, integers in int32. A panel has kColumns output columns side by side and a
// stretch of the contraction that stays in L1, lane c of step i belonging to column c; a tile has R rows of x, R lanes
// a step. So the inner loop broadcasts lanes of x against vectors of the panel, needs no horizontal sums, and reads all
// memory in order.
//
// Steps give a panel step by step: start(i), and then vectors(i, w) of each step from i on.

#if QUANTLIB_LEVEL >= 2
constexpr int kTileRows = 12;
#elif QUANTLIB_LEVEL == 1
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kVectors = 2;
constexpr int64_t kColumns = kVectors * W;

// What int8 is multiplied as: the most to a lane that one instruction multiplies and sums without saturating.
#if QUANTLIB_LEVEL >= 2
typedef int8_t Int;  // vpdpbusd takes the weight as unsigned: 128 is added to it
#elif QUANTLIB_LEVEL == 1
typedef int16_t Int;
#else
typedef int32_t Int;
#endif

// Elements per lane, and what lanes of products are summed to.
template <class E>
constexpr int64_t kPer = 4 / int64_t(sizeof(E));
template <class E>
struct SumsOf {
  typedef float Sum;
  typedef F32 Vector;
};
template <>
struct SumsOf<Int> {
  typedef int32_t Sum;
  typedef I32 Vector;
};

SIMD_INLINE F32 multiply_add(const float* x, F32 w, F32 acc) { return fma(set1(*x), w, acc); }
#if QUANTLIB_LEVEL == 3
SIMD_INLINE F32 multiply_add(const bf16* x, F32 w, F32 acc) {
  return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)set1(load_raw<int32_t>(x)), (__m512bh)w);
}
#endif
#if QUANTLIB_LEVEL >= 2
SIMD_INLINE I32 multiply_add(const Int* x, F32 w, I32 acc) {
  return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)set1(load_raw<int32_t>(x)));
}
#elif QUANTLIB_LEVEL == 1
SIMD_INLINE I32 multiply_add(const Int* x, F32 w, I32 acc) {
  return acc + (I32)_mm256_madd_epi16((__m256i)set1(load_raw<int32_t>(x)), (__m256i)w);
}
#else
SIMD_INLINE I32 multiply_add(const Int* x, F32 w, I32 acc) { return acc + set1(*x) * (I32)w; }
#endif

SIMD_INLINE void add_to(float* p, F32 v) { store(p, load(p) + v); }
// Sums that 128 was added to may wrap around on the way.
SIMD_INLINE void add_to(int32_t* p, I32 v) { store_raw(p, load_raw<U32>(p) + (U32)v); }

// Steps summed in registers before they are added to the total: about what minimises float32's rounding error, which
// must not exceed that of the matmul to compare with. bfloat16's own rounding hides it.
template <class E>
SIMD_INLINE int64_t chain_length(int64_t steps) {
  return kPer<E> > 1 ? 512 : steps <= 256 ? 16 : steps <= 1024 ? 32 : 128;
}

// A panel that lies in memory.
template <class E>
struct Stored {
  const E* panel;

  SIMD_INLINE_MEMBER void start(int64_t) const {}
  SIMD_INLINE_MEMBER void vectors(int64_t i, F32* w) const {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load_raw<F32>(panel + (i * kColumns + v * W) * kPer<E>);
  }
};

// A panel that decode(i, w) decodes and stores, a step ahead of its products: looking up and converting are executed
// beside them, by other ports, so that only multiplying by absmax takes time (Zen 4). Not a step ahead, 12 rows took
// 1.12 times as long.
template <class Decode>
struct DecodedSteps {
  Decode decode;
  int64_t last;
  F32 ahead[kVectors];

  SIMD_INLINE_MEMBER void start(int64_t i) { decode(i, ahead); }
  SIMD_INLINE_MEMBER void vectors(int64_t i, F32* w) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = ahead[v];
    decode(i < last ? i + 1 : i, ahead);
  }
};

// out[r * kColumns + c] += tile row r . panel column c, over steps [begin, end). Not inlined, because the compiler
// would carry `out` from one chain to the next in registers it does not have.
template <int R, class E, class Steps>
[[gnu::noinline]] static void tile_chain(const E* x, Steps panel, int64_t begin, int64_t end,
                                         typename SumsOf<E>::Sum* out) {
  typename SumsOf<E>::Vector acc[R][kVectors] = {};
  panel.start(begin);
  for (int64_t i = begin; i < end; ++i) {
    F32 w[kVectors];
    panel.vectors(i, w);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(x + (i * R + r) * kPer<E>, w[v], acc[r][v]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) add_to(out + r * kColumns + v * W, acc[r][v]);
}

// The same for a stretch, in chains of `chain` steps. Float32 chains are summed apart from the total: adding each to it
// gave errors of eight times their root mean square.
template <int R, class E, class Steps>
static void tile_times_panel(int64_t rows, const E* x, const Steps& panel, int64_t steps, int64_t chain,
                             typename SumsOf<E>::Sum* out) {
  if constexpr (R > 1)
    if (rows < R) return tile_times_panel<R - 1>(rows, x, panel, steps, chain, out);
  const bool apart = kPer<E> == 1 && steps > chain;
  alignas(64) typename SumsOf<E>::Sum sum[R * kColumns];
  if (apart) __builtin_memset(sum, 0, sizeof(sum));
  for (int64_t i = 0; i < steps; i += chain)
    tile_chain<R>(x, panel, i, steps - i < chain ? steps : i + chain, apart ? sum : out);
  if (apart)
    for (int64_t i = 0; i < R * kColumns; i += W) add_to(out + i, load_raw<typename SumsOf<E>::Vector>(sum + i));
}
