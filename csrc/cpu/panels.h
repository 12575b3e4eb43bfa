// Panels of a weight that gives its rows, in both directions: y = x W^T and dx = dy W. Included after tile.h and
// transpose.h.
//
// Panels is what knows the weight, one per thread, for some of the columns; those that need not all derive from
// AnyPanels:
//   kShared                                         whether panels side by side share cache lines of the weight
//   put_in_order(length, E* x)                      a stretch of x, in the order that panels have
//   start(first, count)                             the next columns, at most kAbreast panels of them
//   build<E>(first, count, begin, length, E* panel) a stretch of one of these panels, as the Steps that multiply the
//                                                   first tile of x; after that it lies in `panel`
//   fetch(first, begin, from, to)                   to L2, the weight of columns [from, to) of the panel that is built
//                                                   next; harmless beyond the end

// Elements of the contraction in one panel.
constexpr int64_t kStretch = 256;

struct AnyPanels {
  static constexpr bool kShared = false;
  template <class E>
  static void put_in_order(int64_t, E*) {}
  void start(int64_t, int64_t) const {}
  void fetch(int64_t, int64_t, int64_t, int64_t) const {}
};

// W^T: decode W rows at a time and turn them. Rows has template <class E> decode(row, begin, end, E* out) and prefetch
// of such a range.
template <class Rows>
struct RowPanels : AnyPanels {
  const Rows& w;
  explicit RowPanels(const Rows& w) : w(w) {}

  template <class E>
  Stored<E> build(int64_t first, int64_t count, int64_t begin, int64_t length, E* panel) const {
    E rows[W * kStretch];
    const int64_t steps = (length + kPer<E> - 1) / kPer<E>;
    for (int64_t group = 0; group < kColumns; group += W) {
      for (int64_t i = 0; i < W; ++i) {
        E* row = rows + i * kStretch;
        const int64_t real = group + i < count ? length : 0;
        if (real) w.decode(first + group + i, begin, begin + length, row);
        __builtin_memset(row + real, 0, sizeof(E) * (steps * kPer<E> - real));
      }
      transpose(reinterpret_cast<const uint32_t*>(rows), kStretch / kPer<E>, W - 1, steps,
                reinterpret_cast<uint32_t*>(panel + group * kPer<E>), kColumns);
    }
    return {panel};
  }
  void fetch(int64_t first, int64_t begin, int64_t from, int64_t to) const {
    for (int64_t c = from; c < to; ++c) w.prefetch(first + c, begin, begin + kStretch);
  }
};

// panel = a[0], b[0], a[1], b[1], ...: kColumns pairs.
SIMD_INLINE void interleave(const bf16* a, const bf16* b, bf16* panel) {
#if QUANTLIB_LEVEL >= 2
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

// W: its rows are steps, or halves of steps, already. Rows has prefetch_below(row, begin) of what is soon decoded.
template <class Rows>
struct ColumnPanels : AnyPanels {
  static constexpr bool kShared = true;
  Rows source;
  explicit ColumnPanels(const Rows& source) : source(source) {}

  Stored<float> build(int64_t first, int64_t count, int64_t begin, int64_t length, float* const start) const {
    const Rows w = source;  // a local copy need not be read again after every write
    float* panel = start;
    for (int64_t row = begin; row < begin + length; ++row, panel += kColumns) {
      w.prefetch_below(row, first);
      w.decode(row, first, first + count, panel);
      __builtin_memset(panel + count, 0, sizeof(float) * (kColumns - count));
    }
    return {start};
  }
  Stored<bf16> build(int64_t first, int64_t count, int64_t begin, int64_t length, bf16* const start) const {
    const Rows w = source;
    bf16* panel = start;
    bf16 pair[2][kColumns] = {};
    for (int64_t row = begin; row < begin + length; row += 2, panel += 2 * kColumns) {
      w.prefetch_below(row, first);
      w.prefetch_below(row + 1, first);
      w.decode(row, first, first + count, pair[0]);
      if (row + 1 < begin + length)
        w.decode(row + 1, first, first + count, pair[1]);
      else
        __builtin_memset(pair[1], 0, sizeof(pair[1]));
      interleave(pair[0], pair[1], panel);
    }
    return {start};
  }
};
