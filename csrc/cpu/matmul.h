// Products with a weight that is decoded panel by panel, in both directions: y = x W^T and dx = dy W.
// Included per instruction set after simd.h, transpose.h and branch.h.
//
// The unit is a 32-bit lane holding one float, two bfloat16 or up to four integers (Int) that are neighbours along the
// contraction. Floats are summed in float32, integers in int32. A panel has
// kColumns output columns side by side and a stretch of the contraction that stays in L1, lane c of step i belonging
// to column c; x is packed in tiles of R rows, R lanes a step. So the inner loop broadcasts lanes of x against vectors
// of the panel, needs no horizontal sums, and reads all memory in order. The result of an element does not depend on
// the number of threads.
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

// Elements of the contraction in one panel.
constexpr int64_t kStretch = 256;

// Panels side by side that take turns at a stretch, where that pays: for panels that share cache lines (of 4 bits, one
// line has the columns of four: panel after panel, a line had gone when the next one came to it, and with 14336 rows of
// int8 dx took 1.3 times as long), and for an x that is larger than it may be to be read again for every panel. Its
// stretches then stay in L2 for the turns, so that the weight is decoded once for four times as many rows: 1024 rows of
// 14336 took 0.96 of the time. Smaller ones are slower abreast, 32 rows of int8 by a tenth: reading the weight jumps.
constexpr int64_t kAbreast = 8;
constexpr int64_t kOftenReadBytes = 4 << 20;

// Tiles of x between which the next panel's part of the weight is fetched to L2: enough for it to come from memory, few
// enough for x not to displace it again, as it did when 1024 rows had been fetched for a stretch ahead. The hardware's
// prefetcher does not follow so many short streams.
constexpr int64_t kFetchTiles = 8;

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

// Rows [first, first + rows) of x in `tiles` tiles, all but the last of the same height. They are packed together with
// others, `packed_rows` in all, of which `skipped` come before them.
struct Tiling {
  int64_t first, rows, tiles, height, packed_rows, skipped = 0;

  Tiling(int64_t first, int64_t rows)
      : first(first),
        rows(rows),
        tiles((rows + kTileRows - 1) / kTileRows),
        height((rows + tiles - 1) / tiles),
        packed_rows(rows) {
    tiles = (rows + height - 1) / height;
  }
  int64_t rows_of(int64_t tile) const { return rows - tile * height < height ? rows - tile * height : height; }
  // Where the tile's part of a stretch is packed: stretch after stretch, each of them tile after tile.
  template <class E>
  int64_t offset(int64_t tile, int64_t begin, int64_t steps) const {
    return begin * packed_rows + (skipped + tile * height) * steps * kPer<E>;
  }
  // One of several parts: whole pairs of tiles, so that all but the last have an even number of rows.
  int64_t pairs() const { return (tiles + 1) / 2; }
  Tiling part(int64_t index, int64_t parts) const {
    const int64_t from = pairs() * index / parts * 2, next = pairs() * (index + 1) / parts * 2;
    Tiling some = *this;
    some.skipped = from * height;
    some.first = first + some.skipped;
    some.tiles = (next < tiles ? next : tiles) - from;
    some.rows = (next < tiles ? next * height : rows) - some.skipped;
    return some;
  }
};

// Packs a stretch of a tile, with zeros to fill a lane. read(row, begin, length, E* out) gives elements of x.
template <class Panels, class E, class Read>
static void pack(const Tiling& tiling, int64_t tile, int64_t begin, int64_t depth, const Read& read, E* packed) {
  alignas(64) E buffer[kStretch];
  const int64_t rows = tiling.rows_of(tile), first = tiling.first + tile * tiling.height;
  const int64_t length = depth - begin < kStretch ? depth - begin : kStretch;
  const int64_t steps = (length + kPer<E> - 1) / kPer<E>;
  uint32_t* const lanes = reinterpret_cast<uint32_t*>(packed + tiling.offset<E>(tile, begin, steps));
  for (int64_t r = 0; r < rows; ++r) {
    read(first + r, begin, length, buffer);
    Panels::put_in_order(length, buffer);
    __builtin_memset(buffer + length, 0, sizeof(E) * (steps * kPer<E> - length));
    for (int64_t s = 0; s < steps; ++s) lanes[s * rows + r] = load_raw<uint32_t>(buffer + s * kPer<E>);
  }
}

// Rows of m, of `bytes` bytes each, for which the weight is decoded once: as many as leave their stretches in L2 and
// themselves in a large L3, in passes of the same size, an even number.
static int64_t rows_at_once(int64_t m, int64_t bytes) {
  constexpr int64_t kMost = 1024, kBytes = 16 << 20;
  const int64_t fitting = (kBytes / (bytes * kTileRows + 1) + 1) * kTileRows, most = fitting < kMost ? fitting : kMost;
  const int64_t passes = (m + most - 1) / most;
  return passes > 1 ? (m + 2 * passes - 1) / (2 * passes) * 2 : m;
}

// Parts into which rows are cut for more threads than there are panels, or for panels that do not divide among them:
// as many as make the longest work of a thread shortest. Every part decodes the weight for itself, which is taken for
// as long as a pair of tiles.
static int64_t parts_of_rows(int64_t panels, int64_t pairs) {
  const int64_t threads = thread_count();
  int64_t best = 1, shortest = INT64_MAX;
  for (int64_t parts = 1; parts <= pairs && parts <= threads; ++parts) {
    const int64_t longest = (panels * parts + threads - 1) / threads * ((pairs + parts - 1) / parts + 1);
    if (longest < shortest) best = parts, shortest = longest;
  }
  return best;
}

// Packed rows of x times columns [first, last), `abreast` panels at a time.
template <class E, class Panels, class Finish>
static void multiply_part(const Tiling& tiling, const E* packed, int64_t depth, int64_t first, int64_t last,
                          int64_t abreast, Panels panels, const Finish& finish) {
  typedef typename SumsOf<E>::Sum Sum;
  const int64_t chain = chain_length<E>((depth + kPer<E> - 1) / kPer<E>);
  const int64_t fetches = tiling.tiles < kFetchTiles ? tiling.tiles : kFetchTiles;
  const int64_t sums_size = tiling.rows * kColumns;
  const Scratch<E> panel_buffer(0, kStretch * kColumns);
  const Scratch<Sum> sums(2, abreast * sums_size);
  E* const panel = panel_buffer;
  const auto each = [&](int64_t from, int64_t end, auto visit) {
    Sum* to = sums;
    for (int64_t c = from; c < end; c += kColumns, to += sums_size)
      visit(c, end - c < kColumns ? end - c : kColumns, to);
  };
  for (int64_t c0 = first; c0 < last; c0 += abreast * kColumns) {
    const int64_t limit = c0 + abreast * kColumns, end = limit < last ? limit : last;
    panels.start(c0, end - c0);
    each(c0, end, [&](int64_t, int64_t, Sum* to) { __builtin_memset(to, 0, sizeof(Sum) * sums_size); });
    for (int64_t begin = 0; begin < depth; begin += kStretch) {
      const int64_t length = depth - begin < kStretch ? depth - begin : kStretch;
      const int64_t steps = (length + kPer<E> - 1) / kPer<E>;
      each(c0, end, [&](int64_t c, int64_t count, Sum* to) {
        const bool turn = c + kColumns < end, further = begin + kStretch < depth;
        const int64_t next = turn ? c + kColumns : further ? c0 : end;
        const int64_t next_begin = turn ? begin : further ? begin + kStretch : 0;
        const auto steps_of_first = panels.build(c, count, begin, length, panel);
        for (int64_t t = 0; t < tiling.tiles; ++t) {
          const int64_t i = t - (tiling.tiles - fetches);
          if (i >= 0) panels.fetch(next, next_begin, kColumns * i / fetches, kColumns * (i + 1) / fetches);
          const auto multiply = [&](const auto& panel_steps) {
            tile_times_panel<kTileRows>(tiling.rows_of(t), packed + tiling.offset<E>(t, begin, steps), panel_steps,
                                        steps, chain, to + t * tiling.height * kColumns);
          };
          if (t == 0)
            multiply(steps_of_first);
          else
            multiply(Stored<E>{panel});
        }
      });
    }
    each(c0, end, [&](int64_t c, int64_t count, Sum* from) { finish(panels, tiling, from, c, count); });
  }
}

// read(row, begin, length, E* out) gives elements of x; panels_of(first, last) makes the Panels of a thread;
// finish(panels, tiling, sums, first, count) takes the sums of `count` columns from `first` on, kColumns a row. All
// tilings but the last have an even number of rows.
template <class E, class Read, class MakePanels, class Finish>
static void multiply_panels(int64_t m, int64_t columns, int64_t depth, const Read& read, const MakePanels& panels_of,
                            const Finish& finish) {
  typedef decltype(panels_of(0, 0)) Panels;
  const int64_t width = (depth + kPer<E> - 1) / kPer<E> * kPer<E>;
  const int64_t stretches = (depth + kStretch - 1) / kStretch, panels = (columns + kColumns - 1) / kColumns;
  const int64_t most = rows_at_once(m, width * int64_t(sizeof(E)));
  const bool often_read = most * width * int64_t(sizeof(E)) <= kOftenReadBytes;
  const int64_t abreast = Panels::kShared || !often_read ? kAbreast : 1;
  const Scratch<E> packed(1, most * width);
  for (int64_t m0 = 0; m0 < m; m0 += most) {
    const Tiling tiling(m0, m - m0 < most ? m - m0 : most);
    const int64_t grain = (1 << 14) / (tiling.height * kStretch) + 1;
    parallel_for(tiling.tiles * stretches, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        pack<Panels, E>(tiling, i / stretches, i % stretches * kStretch, depth, read, packed);
    });
    const int64_t parts = parts_of_rows(panels, tiling.pairs());
    parallel_for(parts * panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t next; first < last; first = next) {
        const int64_t part = first / panels, end = (part + 1) * panels;
        next = end < last ? end : last;
        const int64_t from = first % panels * kColumns, to = from + (next - first) * kColumns;
        const int64_t stop = to < columns ? to : columns;
        multiply_part<E>(tiling.part(part, parts), packed, depth, from, stop, abreast, panels_of(from, stop), finish);
      }
    });
  }
}

// What to compute: y[m, columns] = (x[m, depth] * scale) times W^T (or W) + branch + bias, x, bias and y in one dtype;
// scale has `depth` floats.
struct Product {
  const void* x;
  const void* bias;
  int64_t m, columns, depth;
  void* y;
  const float* scale = nullptr;
  Branch branch = {};
};

// Adds branch and bias, rounds and stores `count` columns from c0 on of rows of sums, `stride` floats each and whole
// vectors.
template <class T>
static void finish(const Product& p, float* sums, int64_t stride, int64_t m0, int64_t rows, int64_t c0, int64_t count) {
  if (p.branch.rank) add_branch(p.branch, sums, stride, m0, rows, c0, count);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = sums + r * stride;
    if (p.bias)
      for (int64_t c = 0; c < count; ++c) row[c] += widen(static_cast<const T*>(p.bias)[c0 + c]);
    convert(row, count, static_cast<T*>(p.y) + (m0 + r) * p.columns + c0);
  }
}

template <class E, class T, class MakePanels>
static void multiply(const Product& p, const MakePanels& panels_of) {
  multiply_panels<E>(
      p.m, p.columns, p.depth,
      [&](int64_t row, int64_t begin, int64_t length, E* out) {
        convert(static_cast<const T*>(p.x) + row * p.depth + begin, length, out, p.scale ? p.scale + begin : nullptr);
      },
      panels_of,
      [&](const auto&, const Tiling& tiling, float* sums, int64_t c0, int64_t count) {
        finish<T>(p, sums, kColumns, tiling.first, tiling.rows, c0, count);
      });
}

// bfloat16 multiplies as it is where the CPU can; elsewhere, and for float16, the product is float32's and weights
// enter it unrounded.
template <class MakePanels>
static void multiply(DType dtype, const Product& p, const MakePanels& panels_of) {
  switch (dtype) {
    case DType::f32: return multiply<float, float>(p, panels_of);
    case DType::f16: return multiply<float, f16>(p, panels_of);
    default: break;
  }
#if QUANTLIB_LEVEL == 3
  multiply<bf16, bf16>(p, panels_of);
#else
  multiply<float, bf16>(p, panels_of);
#endif
}
