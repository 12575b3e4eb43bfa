// Products with a weight that is decoded panel by panel, in both directions: y = x W^T and dx = dy W.
// Included per instruction set after simd.h.
//
// The unit is a 32-bit lane holding one float or two bfloat16 that are neighbours along the contraction. A panel has
// kColumns output columns side by side, lane c of step i belonging to column c; x is packed in tiles of R rows, R
// lanes a step. So the inner loop broadcasts lanes of x against vectors of the panel, needs no horizontal sums,
// and reads all memory in order. The result of an element does not depend on the number of threads.
//
// Rows is what knows the weight: template <class E> void decode(row, begin, end, E* out) const.

#if QUANTLIB_LEVEL == 2
constexpr int kTileRows = 12;
#elif QUANTLIB_LEVEL == 1
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kVectors = 2;
constexpr int64_t kColumns = kVectors * W;

// Elements per lane.
template <class E>
constexpr int64_t kPer = 4 / int64_t(sizeof(E));

SIMD_INLINE F32 multiply_add(const float* x, F32 w, F32 acc) { return fma(set1(*x), w, acc); }
#if QUANTLIB_LEVEL == 2
SIMD_INLINE F32 multiply_add(const bf16* x, F32 w, F32 acc) {
  return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)set1(load_raw<int32_t>(x)), (__m512bh)w);
}
#endif

// Steps summed in registers before they are added to the total: about what minimises float32's rounding error, which
// must not exceed that of the matmul to compare with. bfloat16's own rounding hides it.
template <class E>
SIMD_INLINE int64_t chain_length(int64_t steps) {
  return kPer<E> > 1 ? 512 : steps <= 256 ? 16 : steps <= 1024 ? 32 : 128;
}

// out[r * kColumns + c] = tile row r . panel column c.
template <int R, class E>
static void tile_times_panel(const E* x, const E* panel, int64_t steps, float* out) {
  const int64_t chain = chain_length<E>(steps);
  int64_t i = 0;
  do {
    const bool first = i == 0;
    const int64_t stop = steps - i < chain ? steps : i + chain;
    F32 acc[R][kVectors] = {};
    for (; i < stop; ++i) {
      F32 w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = load_raw<F32>(panel + (i * kColumns + v * W) * kPer<E>);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(x + (i * R + r) * kPer<E>, w[v], acc[r][v]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* p = out + r * kColumns + v * W;
        store(p, first ? acc[r][v] : load(p) + acc[r][v]);
      }
  } while (i < steps);
}

// Rows of the tile for that many rows left: full tiles, then the next size that holds the rest.
SIMD_INLINE int64_t tile_rows(int64_t left) {
  if (left >= kTileRows) return kTileRows;
  return left > 8 ? kTileRows : left > 4 ? (kTileRows < 8 ? kTileRows : 8) : left > 2 ? 4 : left;
}

template <class E>
static void tile_times_panel(int64_t rows, const E* x, const E* panel, int64_t steps, float* out) {
  switch (rows) {
    case 1: return tile_times_panel<1>(x, panel, steps, out);
    case 2: return tile_times_panel<2>(x, panel, steps, out);
    case 4: return tile_times_panel<4>(x, panel, steps, out);
#if QUANTLIB_LEVEL == 2
    case 8: return tile_times_panel<8>(x, panel, steps, out);
#endif
    default: return tile_times_panel<kTileRows>(x, panel, steps, out);
  }
}

// A lane-wise transpose of up to W rows: rows [i * ldr + step] -> panel [step * kColumns + i].
SIMD_INLINE void transpose(const uint32_t* rows, int64_t ldr, int64_t steps, uint32_t* panel) {
  int64_t s = 0;
#if QUANTLIB_LEVEL == 2
  for (; s + 16 <= steps; s += 16) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * ldr + s);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
      b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(panel + (s + i) * kColumns, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
      _mm512_storeu_si512(panel + (s + 8 + i) * kColumns, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
      _mm512_storeu_si512(panel + (s + 4 + i) * kColumns, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
      _mm512_storeu_si512(panel + (s + 12 + i) * kColumns, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
  }
#endif
  for (; s < steps; ++s)
    for (int i = 0; i < W; ++i) panel[s * kColumns + i] = rows[i * ldr + s];
}

// Columns [first, first + count) of W^T: decode W rows at a time, a stretch that stays in L1, and turn them.
template <class E, class Rows>
static void panel_of_rows(const Rows& w, int64_t first, int64_t count, int64_t k, E* panel) {
  constexpr int64_t kStretch = 256;
  E rows[W * kStretch];
  for (int64_t begin = 0; begin < k; begin += kStretch) {
    const int64_t length = k - begin < kStretch ? k - begin : kStretch;
    const int64_t steps = (length + kPer<E> - 1) / kPer<E>;
    for (int64_t group = 0; group < kColumns; group += W) {
      for (int64_t i = 0; i < W; ++i) {
        E* row = rows + i * kStretch;
        if (group + i < count) {
          w.decode(first + group + i, begin, begin + length, row);
          __builtin_memset(row + length, 0, sizeof(E) * (steps * kPer<E> - length));
        } else {
          __builtin_memset(row, 0, sizeof(E) * steps * kPer<E>);
        }
      }
      transpose(reinterpret_cast<const uint32_t*>(rows), kStretch / kPer<E>, steps,
                reinterpret_cast<uint32_t*>(panel + (begin / kPer<E> * kColumns + group) * kPer<E>));
    }
  }
}

// Columns [first, first + count) of W: rows of W are steps, or halves of steps, already.
template <class Rows>
static void panel_of_columns(const Rows& w, int64_t first, int64_t count, int64_t n, float* panel) {
  for (int64_t row = 0; row < n; ++row) {
    w.decode(row, first, first + count, panel + row * kColumns);
    __builtin_memset(panel + row * kColumns + count, 0, sizeof(float) * (kColumns - count));
  }
}
// panel = a[0], b[0], a[1], b[1], ...: kColumns pairs.
SIMD_INLINE void interleave(const bf16* a, const bf16* b, bf16* panel) {
#if QUANTLIB_LEVEL == 2
  const __m512i low = _mm512_loadu_si512(a), high = _mm512_loadu_si512(b);
  // Lane i of an index vector takes from low (i even) or high (i odd: 32 and up).
  const __m512i lanes = _mm512_cvtepu8_epi32(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i first =
      _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(32 << 16));
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(low, first, high));
  _mm512_storeu_si512(panel + 32, _mm512_permutex2var_epi16(low, second, high));
#else
  for (int64_t c = 0; c < kColumns; ++c) {
    panel[2 * c] = a[c];
    panel[2 * c + 1] = b[c];
  }
#endif
}

template <class Rows>
static void panel_of_columns(const Rows& w, int64_t first, int64_t count, int64_t n, bf16* panel) {
  bf16 pair[2][kColumns] = {};
  for (int64_t row = 0; row < n; row += 2, panel += 2 * kColumns) {
    w.decode(row, first, first + count, pair[0]);
    if (row + 1 < n)
      w.decode(row + 1, first, first + count, pair[1]);
    else
      __builtin_memset(pair[1], 0, sizeof(pair[1]));
    interleave(pair[0], pair[1], panel);
  }
}

// Packs rows [first, first + count) of x[., depth] as one tile of `rows` rows, padding with zeros.
template <class T, class E>
static void pack_tile(const T* x, int64_t first, int64_t count, int64_t depth, int64_t rows, E* out) {
  constexpr int64_t kStretch = 512;
  alignas(64) E buffer[kStretch];
  for (int64_t begin = 0; begin < depth; begin += kStretch) {
    const int64_t length = depth - begin < kStretch ? depth - begin : kStretch;
    const int64_t steps = (length + kPer<E> - 1) / kPer<E>;
    uint32_t* lanes = reinterpret_cast<uint32_t*>(out) + begin / kPer<E> * rows;
    for (int64_t r = 0; r < rows; ++r) {
      if (r < count)
        convert(x + (first + r) * depth + begin, length, buffer);
      else
        __builtin_memset(buffer, 0, sizeof(E) * length);
      __builtin_memset(buffer + length, 0, sizeof(E) * (steps * kPer<E> - length));
      for (int64_t s = 0; s < steps; ++s) lanes[s * rows + r] = load_raw<uint32_t>(buffer + s * kPer<E>);
    }
  }
}

// What to compute: y[m, columns] = x[m, depth] times W^T (or W) + bias, x, bias and y in one dtype.
struct Product {
  const void* x;
  const void* bias;
  int64_t m, columns, depth;
  void* y;
};

template <bool Transposed, class E, class T, class Rows>
static void multiply(const Product& p, const Rows& w) {
  constexpr int64_t kRowsAtOnce = 85 * kTileRows;  // packed x stays in L3; the weight is decoded once for so many rows
  const int64_t steps = (p.depth + kPer<E> - 1) / kPer<E>;
  const int64_t tile_size = steps * kPer<E>;
  const int64_t most = p.m < kRowsAtOnce ? (p.m + kTileRows) : kRowsAtOnce;
  const Scratch<E> packed(1, most * tile_size);
  for (int64_t m0 = 0; m0 < p.m; m0 += kRowsAtOnce) {
    const int64_t rows = p.m - m0 < kRowsAtOnce ? p.m - m0 : kRowsAtOnce;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    parallel_for(tiles, (1 << 14) / (tile_size * kTileRows + 1) + 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const int64_t left = rows - t * kTileRows, size = tile_rows(left);
        pack_tile(static_cast<const T*>(p.x), m0 + t * kTileRows, left < size ? left : size, p.depth, size,
                  packed + t * kTileRows * tile_size);
      }
    });
    parallel_for((p.columns + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
      const Scratch<E> panel(0, tile_size * kColumns);
      for (int64_t block = first; block < last; ++block) {
        const int64_t c0 = block * kColumns;
        const int64_t count = p.columns - c0 < kColumns ? p.columns - c0 : kColumns;
        if constexpr (Transposed) {
          panel_of_rows(w, c0, count, p.depth, static_cast<E*>(panel));
          w.prefetch(c0 + kColumns, c0 + 2 * kColumns);
        } else {
          panel_of_columns(w, c0, count, p.depth, static_cast<E*>(panel));
        }
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t left = rows - t * kTileRows, size = tile_rows(left);
          alignas(64) float out[kTileRows * kColumns];
          tile_times_panel<E>(size, packed + t * kTileRows * tile_size, panel, steps, out);
          for (int64_t r = 0; r < size && r < left; ++r) {
            float* row = out + r * kColumns;
            if (p.bias)
              for (int64_t c = 0; c < count; ++c) row[c] += widen(static_cast<const T*>(p.bias)[c0 + c]);
            convert(row, count, static_cast<T*>(p.y) + (m0 + t * kTileRows + r) * p.columns + c0);
          }
        }
      }
    });
  }
}

// bfloat16 multiplies as it is where the CPU can; elsewhere, and for float16, the product is float32's and weights
// enter it unrounded.
template <bool Transposed, class Rows>
static void multiply(DType dtype, const Product& p, const Rows& w) {
  switch (dtype) {
    case DType::f32: return multiply<Transposed, float, float>(p, w);
    case DType::f16: return multiply<Transposed, float, f16>(p, w);
    case DType::bf16:
#if QUANTLIB_LEVEL == 2
      return multiply<Transposed, bf16, bf16>(p, w);
#else
      return multiply<Transposed, float, bf16>(p, w);
#endif
  }
}
