// Products with a weight that is decoded panel by panel. Included after panels.h and branch.h.
//
// x is packed in tiles, stretch by stretch. The result of an element does not depend on the number of threads.

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
