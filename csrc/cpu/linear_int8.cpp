// Absmax int8: quantize, dequantize, and LLM.int8() (Dettmers et al., 2022): int8 x int8 with outlier columns.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "linear_int8.cpp"
#include "each_isa.h"

namespace quantlib {

void quantize_int8_rows(DType dtype, const void* x, int64_t rows, int64_t k, float threshold, int8_t* values,
                        float* absmax, uint8_t* outliers) {
  QUANTLIB_DISPATCH(quantize_int8_rows)(dtype, x, rows, k, threshold, values, absmax, outliers);
}

void quantize_int8_blocks(DType dtype, const void* x, int64_t n, int64_t block_size, int8_t* values, float* absmax) {
  QUANTLIB_DISPATCH(quantize_int8_blocks)(dtype, x, n, block_size, values, absmax);
}

void quantize_int8_columns(DType dtype, const void* x, int64_t rows, int64_t k, int8_t* values, float* absmax) {
  QUANTLIB_DISPATCH(quantize_int8_columns)(dtype, x, rows, k, values, absmax);
}

void dequantize_int8(const int8_t* values, const float* absmax, bool by_column, int64_t n, int64_t period, DType dtype,
                     void* out) {
  QUANTLIB_DISPATCH(dequantize_int8)(values, absmax, by_column, n, period, dtype, out);
}

void linear_int8(const LinearInt8& a) { QUANTLIB_DISPATCH(linear_int8)(a); }
void linear_int8_dx(const LinearInt8& a) {
  if (a.dtype != DType::bf16 || !by_onednn(a.m, a.n, a.k)) return QUANTLIB_DISPATCH(linear_int8_dx)(a);
  const BriefBlock<bf16> w(a.n * a.k);
  dequantize_int8(a.w, a.w_absmax, false, a.n * a.k, a.k, DType::bf16, w);
  onednn_linear(static_cast<const bf16*>(a.x), w, false, nullptr, a.m, a.k, a.n, static_cast<bf16*>(a.y));
  add_branch_to(a.dtype, a.branch, a.m, a.k, a.y);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "transpose.h"
#include "dot_tile_int8.h"
#include "branch.h"
#include "tile.h"
#include "panels.h"
#include "matmul.h"

constexpr float kStep = 1.0f / 127.0f;

// 0 where no finite scale exists, which makes the values 0: absmax zero or tiny, infinite or NaN.
// Two roundings, because that is how PyTorch, and so bitsandbytes, evaluates 127 / absmax.
SIMD_INLINE float scale_of(float absmax) {
  const float scale = 1.0f / absmax * 127.0f;
  return __builtin_fabsf(scale) <= 0x1.fffffep127f && absmax <= 0x1.fffffep127f ? scale : 0.0f;
}

// Inf and NaN times a zero scale give NaN, which must become 0 and not what the conversion makes of it.
SIMD_INLINE I32 quantized(F32 v, F32 scale) {
  const F32 scaled = v * scale;
  return round((F32)((I32)scaled & (I32)(scaled == scaled)));
}

template <class T>
SIMD_INLINE void quantize_row(const T* x, int64_t n, float scale, int8_t* values) {
  const F32 s = set1(scale);
  int64_t i = 0;
  for (; i + W <= n; i += W) store_i8(values + i, quantized(load(x + i), s));
  if (i < n) store_i8_part(values + i, quantized(load_part(x + i, n - i), s), n - i);
}

// Largest magnitude below the threshold; marks the columns of the others. Several threads may mark one column.
template <class T>
static float absmax_below(const T* x, int64_t n, float threshold, uint8_t* outliers) {
  I32 m = {};
  T limit_of_x;  // bitsandbytes compares in x's dtype
  narrow(threshold, &limit_of_x);
  const F32 limit = set1(widen(limit_of_x));
  for (int64_t i = 0; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    const I32 bits = magnitude(count == W ? load(x + i) : load_part(x + i, count));
    const I32 outlier = (I32)((F32)bits >= limit);
    m = max(m, bits & ~outlier);
    if (__builtin_expect(any(outlier), 0))
      for (int64_t j = 0; j < count; ++j)
        if (outlier[j]) __atomic_store_n(outliers + i + j, uint8_t(1), __ATOMIC_RELAXED);
  }
  return as_float(max(m));
}

// The sum of a row of quantized x.
SIMD_INLINE int32_t row_sum(const int8_t* q, int64_t k) {
  int32_t total = 0;
  for (int64_t i = 0; i < k; ++i) total += q[i];
  return total;
}

// Lists the columns that are marked; returns how many.
static int64_t list_columns(const uint8_t* marks, int64_t k, int64_t* columns) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < k; begin += 8) {
    const int64_t end = begin + 8 < k ? begin + 8 : k;
    if (end - begin == 8 && !load_raw<uint64_t>(marks + begin)) continue;
    for (int64_t c = begin; c < end; ++c)
      if (marks[c]) columns[count++] = c;
  }
  return count;
}

// Outlier columns are marked, listed and 0 in the values; returns how many there are.
template <class T>
static int64_t quantize_rows(const void* source, int64_t rows, int64_t k, float threshold, int8_t* values,
                             float* absmaxes, uint8_t* outliers, int64_t* columns) {
  const T* x = static_cast<const T*>(source);
  const int64_t grain = (1 << 14) / (k + 1) + 1;
  parallel_for(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      absmaxes[r] = outliers ? absmax_below(x + r * k, k, threshold, outliers) : absmax(x + r * k, k);
      quantize_row(x + r * k, k, scale_of(absmaxes[r]), values + r * k);
    }
  });
  const int64_t count = outliers ? list_columns(outliers, k, columns) : 0;
  if (count)
    parallel_for(rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        for (int64_t c = 0; c < count; ++c) values[r * k + columns[c]] = 0;
    });
  return count;
}

void quantize_int8_rows(DType dtype, const void* x, int64_t rows, int64_t k, float threshold, int8_t* values,
                        float* absmaxes, uint8_t* outliers) {
  const Scratch<int64_t> columns(6, outliers ? k : 0);
  QUANTLIB_BY_DTYPE(dtype, quantize_rows, x, rows, k, threshold, values, absmaxes, outliers, columns);
}

// A maximum of several threads. Magnitudes compare as integers, NaN largest; the order of the threads does not matter.
SIMD_INLINE void raise(int32_t* target, int32_t value) {
  int32_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(target, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Blocks of the flat tensor. Few large blocks (one: the whole tensor) are cut into pieces for the threads.
template <class T>
static void quantize_flat(const void* source, int64_t n, int64_t block_size, int8_t* values, float* absmaxes) {
  const T* x = static_cast<const T*>(source);
  const int64_t blocks = (n + block_size - 1) / block_size;
  const int64_t piece = block_size < 4096 ? block_size : 4096;
  const int64_t per_block = (block_size + piece - 1) / piece;
  __builtin_memset(absmaxes, 0, sizeof(float) * blocks);
  const auto sweep = [&](auto visit) {
    parallel_for(blocks * per_block, 4096 / piece, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t block = i / per_block, begin = block * block_size + i % per_block * piece;
        int64_t end = (block + 1) * block_size;
        if (begin + piece < end) end = begin + piece;
        if (n < end) end = n;
        if (begin < end) visit(block, begin, end);
      }
    });
  };
  sweep([&](int64_t block, int64_t begin, int64_t end) {
    raise(reinterpret_cast<int32_t*>(absmaxes + block), as_int(absmax(x + begin, end - begin)));
  });
  sweep([&](int64_t block, int64_t begin, int64_t end) {
    quantize_row(x + begin, end - begin, scale_of(absmaxes[block]), values + begin);
  });
}

void quantize_int8_blocks(DType dtype, const void* x, int64_t n, int64_t block_size, int8_t* values, float* absmaxes) {
  QUANTLIB_BY_DTYPE(dtype, quantize_flat, x, n, block_size, values, absmaxes);
}

// By rows, in the order of memory, twice: columns at a time took 2.5 times as long out of the cache (14336 x 4096).
template <class T>
static void quantize_columns(const void* source, int64_t rows, int64_t k, int8_t* values, float* absmaxes) {
  const T* x = static_cast<const T*>(source);
  const int64_t grain = (1 << 14) / (k + 1) + 1;
  int32_t* const maxima = reinterpret_cast<int32_t*>(absmaxes);
  __builtin_memset(maxima, 0, sizeof(int32_t) * k);
  parallel_for(rows, grain, [&](int64_t first, int64_t last) {
    const Scratch<int32_t> own(0, k + W);
    __builtin_memset(own, 0, sizeof(int32_t) * (k + W));
    for (int64_t r = first; r < last; ++r)
      for (int64_t i = 0; i < k; i += W) {
        const F32 v = i + W <= k ? load(x + r * k + i) : load_part(x + r * k + i, k - i);
        store_raw(own + i, max(load_raw<I32>(own + i), magnitude(v)));
      }
    for (int64_t i = 0; i < k; ++i) raise(maxima + i, own[i]);
  });
  const Scratch<float> scale(1, k);
  for (int64_t i = 0; i < k; ++i) scale[i] = scale_of(absmaxes[i]);
  parallel_for(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T* p = x + r * k;
      int8_t* out = values + r * k;
      int64_t i = 0;
      for (; i + W <= k; i += W) store_i8(out + i, quantized(load(p + i), load(scale + i)));
      if (i < k) store_i8_part(out + i, quantized(load_part(p + i, k - i), load_part(scale + i, k - i)), k - i);
    }
  });
}

void quantize_int8_columns(DType dtype, const void* x, int64_t rows, int64_t k, int8_t* values, float* absmaxes) {
  QUANTLIB_BY_DTYPE(dtype, quantize_columns, x, rows, k, values, absmaxes);
}

// Not by __builtin_convertvector, which GCC 12 does element by element here.
#if QUANTLIB_LEVEL >= 2
SIMD_INLINE F32 load(const int8_t* p) { return (F32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_raw<__m128i>(p))); }
#elif QUANTLIB_LEVEL == 1
SIMD_INLINE F32 load(const int8_t* p) {
  return (F32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#else
SIMD_INLINE F32 load(const int8_t* p) { return __builtin_convertvector(load_raw<I8>(p), F32); }
#endif

// int8 in the types of products, all of which hold it exactly: a bfloat16 in the upper half of the float; an Int as the
// weight has it.
SIMD_INLINE void convert_values(const int8_t* in, int64_t n, Int* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Int(in[i] + kInt8Offset);
}
SIMD_INLINE void convert_values(const int8_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = float(in[i]);
}
SIMD_INLINE void convert_values(const int8_t* in, int64_t n, bf16* out) {
  int64_t i = 0;
#if QUANTLIB_LEVEL == 3
  // Whole vectors: two halves stored one by one stalled the load of both that follows.
  for (; i + 2 * W <= n; i += 2 * W)
    store_raw(out + i, _mm512_cvtne2ps_pbh((__m512)load(in + i + W), (__m512)load(in + i)));
#endif
  for (; i + W <= n; i += W) store_raw(out + i, __builtin_convertvector((U32)load(in + i) >> 16, U16));
  for (; i < n; ++i) narrow(float(in[i]), out + i);
}

// values * absmax * (1/127) for elements [begin, end); absmax advances with the element if by_column.
template <class T>
static void dequantize_run(const int8_t* values, const float* absmaxes, bool by_column, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F32 scale = by_column ? load(absmaxes + i) : set1(*absmaxes);
    store(out + i, load(values + i) * scale * kStep);
  }
  for (; i < n; ++i) narrow(float(values[i]) * absmaxes[by_column ? i : 0] * kStep, out + i);
}

template <class T>
static void dequantize(const int8_t* values, const float* absmaxes, bool by_column, int64_t n, int64_t period,
                       void* target) {
  T* out = static_cast<T*>(target);
  constexpr int64_t kChunk = 1 << 14;
  parallel_for((n + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    const int64_t end = last * kChunk < n ? last * kChunk : n;
    for (int64_t i = first * kChunk; i < end;) {
      const int64_t row = i / period, row_end = (row + 1) * period;
      const int64_t stop = row_end < end ? row_end : end;
      dequantize_run(values + i, absmaxes + (by_column ? i - row * period : row), by_column, stop - i, out + i);
      i = stop;
    }
  });
}

void dequantize_int8(const int8_t* values, const float* absmaxes, bool by_column, int64_t n, int64_t period,
                     DType dtype, void* out) {
  QUANTLIB_BY_DTYPE(dtype, dequantize, values, absmaxes, by_column, n, period, out);
}

// x after quantization, and what is multiplied in float: the outlier columns, `count` of them, and after them the s of
// a LoRA branch; [m, width].
struct Activations {
  const int8_t* q;
  const uint32_t* offsets;  // what the products of each row are too large by, modulo 2^32
  const float* absmax;
  const int64_t* columns;
  int64_t count, width;
  const float* floats;
};

// What N neighbouring rows of the weight, columns of y, bring to the end of a product, and that end: scales, outlier
// columns, bias, one rounding.
template <int64_t N>
struct Columns {
  const LinearInt8& a;
  const Activations& x;
  Scratch<float> floats;  // [x.width, N]: the weight's outlier columns, the branch's b; then what turning b fills
  alignas(64) float absmax[N];

  Columns(const LinearInt8& a, const Activations& x)
      : a(a), x(x), floats(8, (x.count + whole_vectors(a.branch.rank)) * N) {}

  // Once the rows have passed, since few elements of many rows are slow to come from memory.
  void gather(int64_t first, int64_t count) {
    for (int64_t j = 0; j < N; ++j) {
      absmax[j] = j < count ? a.w_absmax[first + j] : 0;
      for (int64_t c = 0; c < x.count; ++c)
        floats[c * N + j] = j < count ? float(a.w[(first + j) * a.k + x.columns[c]]) * absmax[j] * kStep : 0;
    }
    if (a.branch.rank) turn_branch(a.branch, first, count, floats + x.count * N, N);
  }
  // `count` elements of row m of y from column n on; sums has N integers.
  template <class T>
  void finish(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    constexpr float kStep2 = float(1.0 / (127.0 * 127.0));
    constexpr int64_t kChain = 128;  // of thousands of outlier columns, one chain had six times PyTorch's error
    alignas(64) float y[N];
    for (int64_t j = 0; j < N; j += W) {
      const I32 total = (I32)(load_raw<U32>(sums + j) - x.offsets[m]);
      const F32 v = __builtin_convertvector(total, F32) * (x.absmax[m] * load(absmax + j)) * kStep2;
      F32 extra = {};
      for (int64_t c = 0; c < x.width;) {
        const int64_t end = c + kChain < x.width ? c + kChain : x.width;
        F32 part = {};
        for (; c < end; ++c) part = fma(set1(x.floats[m * x.width + c]), load(floats + c * N + j), part);
        extra += part;
      }
      store(y + j, x.width ? v + extra : v);
    }
    if (a.bias)
      for (int64_t j = 0; j < count; ++j) y[j] += widen(static_cast<const T*>(a.bias)[n + j]);
    convert(y, count, static_cast<T*>(a.y) + m * a.n + n);
  }
};

// Most rows for which dot products beat panels, measured.
constexpr int64_t kFewRows = QUANTLIB_LEVEL >= 2 ? 64 : 24;

// Few rows of x: dot products with the rows of the weight as they lie.
template <class T>
static void few_rows(const LinearInt8& a, const Activations& x) {
  constexpr int64_t kStrip = 8 * kTileN;  // columns finished at a time: whole vectors
  constexpr int64_t kLeast = 4;           // tiles of a thread: half a strip, so that many threads have enough of them
  parallel_for((a.n + kTileN - 1) / kTileN, kLeast, [&](int64_t begin, int64_t end) {
    Columns<kStrip> columns(a, x);
    alignas(64) int32_t sums[kFewRows][kStrip] = {};
    const int64_t last = end * kTileN < a.n ? end * kTileN : a.n;
    for (int64_t n = begin * kTileN; n < last; n += kStrip) {
      const int64_t count = last - n < kStrip ? last - n : kStrip;
      for (int64_t c = 0; c < count; c += kTileN) {
        const int64_t width = count - c < kTileN ? count - c : kTileN;
        const int8_t* w = a.w + (n + c) * a.k;
        for (int64_t m = 0; m < a.m; m += kTileM)
          dot_rows_int8(x.q + m * a.k, w, a.k, a.m - m < kTileM ? a.m - m : kTileM, width, sums[m] + c, kStrip);
      }
      columns.gather(n, count);
      for (int64_t m = 0; m < a.m; ++m) columns.finish<T>(m, n, count, sums[m]);
    }
  });
}

// The values of an int8 weight as elements of a product; their scales are the caller's.
struct RowsInt8 {
  const int8_t* values;
  int64_t k;

  template <class E>
  SIMD_INLINE_MEMBER void decode(int64_t row, int64_t begin, int64_t end, E* out) const {
    convert_values(values + row * k + begin, end - begin, out);
  }
  SIMD_INLINE_MEMBER void prefetch(int64_t row, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(values + row * k + i, 0, 2);
  }
  SIMD_INLINE_MEMBER void prefetch_below(int64_t row, int64_t begin) const {
    __builtin_prefetch(values + (row + 32) * k + begin, 0, 2);
  }
};

// Many rows: panels for multiply_panels().
struct PanelsInt8 : RowPanels<RowsInt8> {
  Columns<kColumns> columns;

  PanelsInt8(const RowsInt8& rows, const LinearInt8& a, const Activations& x) : RowPanels(rows), columns(a, x) {}

  Stored<Int> build(int64_t first, int64_t count, int64_t begin, int64_t length, Int* panel) const {
    if (kPer<Int> < 4 || w.k % 4) return RowPanels::build(first, count, begin, length, panel);
    for (int64_t group = 0; group < kColumns; group += W) {
      const int64_t row = first + (group < count ? group : count - 1), last = first + count - 1 - row;
      transpose(reinterpret_cast<const uint32_t*>(w.values + row * w.k + begin), w.k / 4, last, length / 4,
                reinterpret_cast<uint32_t*>(panel) + group, kColumns, kInt8Offset * 0x01010101u);
    }
    return {panel};
  }
};

template <class T>
static void many_rows(const LinearInt8& a, const Activations& x) {
  const RowsInt8 rows{a.w, a.k};
  multiply_panels<Int>(
      a.m, a.n, a.k,
      [&](int64_t row, int64_t begin, int64_t length, Int* out) {
        const int8_t* in = x.q + row * a.k + begin;
        for (int64_t i = 0; i < length; ++i) out[i] = in[i];
      },
      [&](int64_t, int64_t) { return PanelsInt8(rows, a, x); },
      [&](PanelsInt8& panels, const Tiling& tiling, const int32_t* sums, int64_t first, int64_t count) {
        panels.columns.gather(first, count);
        for (int64_t r = 0; r < tiling.rows; ++r) {
          // Every row of y is a line in another page. Fetched ahead, products of 64 to 1024 rows took 0.98 of the time.
          __builtin_prefetch(static_cast<const T*>(a.y) + (tiling.first + r + 8) * a.n + first, 1);
          panels.columns.finish<T>(tiling.first + r, first, count, sums + r * kColumns);
        }
      });
}

// Many rows by oneDNN, whose sums are finished afterwards.
template <class T>
static void onednn_rows(const LinearInt8& a, const Activations& x) {
  constexpr int64_t kBytes = 32 << 20, kWide = 4 * kColumns;
  const int64_t fitting = kBytes / (a.n * int64_t(sizeof(int32_t))) + 1, rows_at_once = a.m < fitting ? a.m : fitting;
  const BriefBlock<int32_t> sums(rows_at_once * a.n);
  for (int64_t m0 = 0; m0 < a.m; m0 += rows_at_once) {
    const int64_t rows = a.m - m0 < rows_at_once ? a.m - m0 : rows_at_once;
    onednn_int8(x.q + m0 * a.k, a.w, rows, a.n, a.k, sums);
    parallel_for((a.n + kWide - 1) / kWide, 1, [&](int64_t first, int64_t last) {
      Columns<kWide> columns(a, x);
      alignas(64) int32_t row[kWide] = {};
      for (int64_t n = first * kWide; n < a.n && n < last * kWide; n += kWide) {
        const int64_t count = a.n - n < kWide ? a.n - n : kWide;
        columns.gather(n, count);
        for (int64_t r = 0; r < rows; ++r) {
          __builtin_memcpy(row, sums + r * a.n + n, sizeof(int32_t) * count);
          columns.finish<T>(m0 + r, n, count, row);
        }
      }
    });
  }
}

template <class T>
static void linear(const LinearInt8& a) {
  const Scratch<int8_t> q(3, a.m * a.k);
  const Scratch<float> absmaxes(4, a.m);
  const bool split = a.threshold > 0;
  const Scratch<uint8_t> mask(5, split ? a.k : 0);
  if (split) __builtin_memset(mask, 0, a.k);
  const Scratch<int64_t> columns(6, split ? a.k : 0);
  const int64_t count =
      quantize_rows<T>(a.x, a.m, a.k, a.threshold, q, absmaxes, split ? (uint8_t*)mask : nullptr, columns);
  const int64_t rank = a.branch.rank, width = count + rank;
  const Scratch<float> floats(7, a.m * width);
  const bool onednn = by_onednn(a.m, a.n, a.k);
  const Scratch<uint32_t> offsets(9, a.m);
  parallel_for(a.m, (1 << 14) / (a.k + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const T* const row = static_cast<const T*>(a.x) + m * a.k;
      for (int64_t c = 0; c < count; ++c) floats[m * width + c] = widen(row[columns[c]]);
      if (rank) __builtin_memcpy(floats + m * width + count, a.branch.s + m * rank, sizeof(float) * rank);
      offsets[m] = onednn ? 0 : uint32_t(kInt8Offset) * uint32_t(row_sum(q + m * a.k, a.k));
    }
  });
  const Activations x{q, offsets, absmaxes, columns, count, width, floats};
  (onednn ? onednn_rows<T> : a.m <= kFewRows ? few_rows<T> : many_rows<T>)(a, x);
}

void linear_int8(const LinearInt8& a) { QUANTLIB_BY_DTYPE(a.dtype, linear, a); }

#if QUANTLIB_LEVEL == 3
// W for dx, in bfloat16, which holds its values exactly: rows are converted two at once, side by side as the panel has
// them. What stands beside the last of an odd number of rows is multiplied by zeros.
struct ConvertPairs {
  const int8_t* values;
  int64_t k, rows;
  bf16* panel;

  SIMD_INLINE_MEMBER void operator()(int64_t i, F32* w) const {
    const int8_t* const a = values + 2 * i * k;
    const int8_t* const b = a + (2 * i + 1 < rows ? k : 0);
    __builtin_prefetch(a + 32 * k, 0, 2);
    __builtin_prefetch(a + 33 * k, 0, 2);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const __m128i low = load_raw<__m128i>(a + v * W), high = load_raw<__m128i>(b + v * W);
      const __m512 halves[2] = {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_unpacklo_epi8(low, high))),
                                _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_unpackhi_epi8(low, high)))};
      w[v] = (F32)_mm512_cvtne2ps_pbh(halves[1], halves[0]);
      store_raw(panel + 2 * (i * kColumns + v * W), w[v]);
    }
  }
};

struct PairsInt8 : AnyPanels {
  static constexpr bool kShared = true;
  const int8_t* values;
  int64_t n, k;
  PairsInt8(const int8_t* values, int64_t n, int64_t k) : values(values), n(n), k(k) {}

  DecodedSteps<ConvertPairs> build(int64_t first, int64_t, int64_t begin, int64_t length, bf16* panel) const {
    return {{values + begin * k + first, k, n - begin, panel}, (length - 1) / 2, {}};
  }
};
#endif

// The scales of the weight go to dy: rounding their product instead of the weight costs no accuracy, and the weight's
// values are exact in every type.
void linear_int8_dx(const LinearInt8& a) {
  const Scratch<float> scale(3, a.n);
  for (int64_t n = 0; n < a.n; ++n) scale[n] = a.w_absmax[n] * kStep;
  const Product product{a.x, nullptr, a.m, a.k, a.n, a.y, scale, a.branch};
#if QUANTLIB_LEVEL == 3
  if (a.dtype == DType::bf16 && a.k % kColumns == 0) {
    multiply<bf16, bf16>(product, [&](int64_t, int64_t) { return PairsInt8(a.w, a.n, a.k); });
    return;
  }
#endif
  const RowsInt8 rows{a.w, a.k};
  multiply(a.dtype, product, [&](int64_t, int64_t) { return ColumnPanels<RowsInt8>(rows); });
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
