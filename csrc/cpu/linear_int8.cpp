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
void linear_int8_dx(const LinearInt8& a) { QUANTLIB_DISPATCH(linear_int8_dx)(a); }

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"
#include "dot_tile.h"
#include "dot_tile_int8.h"
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

SIMD_INLINE bool any(I32 mask) { return max(mask & 1) != 0; }

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

template <class T>
static void quantize_rows(const void* source, int64_t rows, int64_t k, float threshold, int8_t* values, float* absmaxes,
                          uint8_t* outliers) {
  const T* x = static_cast<const T*>(source);
  const int64_t grain = (1 << 14) / (k + 1) + 1;
  parallel_for(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      absmaxes[r] = outliers ? absmax_below(x + r * k, k, threshold, outliers) : absmax(x + r * k, k);
      quantize_row(x + r * k, k, scale_of(absmaxes[r]), values + r * k);
    }
  });
  if (!outliers || !__builtin_memchr(outliers, 1, k)) return;
  parallel_for(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t c = 0; c < k; ++c) values[r * k + c] &= int8_t(outliers[c] - 1);
  });
}

void quantize_int8_rows(DType dtype, const void* x, int64_t rows, int64_t k, float threshold, int8_t* values,
                        float* absmaxes, uint8_t* outliers) {
  QUANTLIB_BY_DTYPE(dtype, quantize_rows, x, rows, k, threshold, values, absmaxes, outliers);
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
    // Magnitudes compare as integers, NaN largest; a maximum does not depend on the order of the threads.
    const int32_t m = as_int(absmax(x + begin, end - begin));
    int32_t* target = reinterpret_cast<int32_t*>(absmaxes + block);
    int32_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (seen < m && !__atomic_compare_exchange_n(target, &seen, m, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  });
  sweep([&](int64_t block, int64_t begin, int64_t end) {
    quantize_row(x + begin, end - begin, scale_of(absmaxes[block]), values + begin);
  });
}

void quantize_int8_blocks(DType dtype, const void* x, int64_t n, int64_t block_size, int8_t* values, float* absmaxes) {
  QUANTLIB_BY_DTYPE(dtype, quantize_flat, x, n, block_size, values, absmaxes);
}

// A strip of columns narrow enough for its running maxima to stay in registers and L1.
template <class T>
static void quantize_strip(const T* x, int64_t rows, int64_t k, int64_t first, int64_t last, int8_t* values,
                           float* absmaxes) {
  constexpr int64_t kStrip = 256;
  for (int64_t begin = first; begin < last; begin += kStrip) {
    const int64_t count = last - begin < kStrip ? last - begin : kStrip;
    int32_t maxima[kStrip] = {};
    float scale[kStrip];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < count; i += W) {
        const T* p = x + r * k + begin + i;
        const F32 v = i + W <= count ? load(p) : load_part(p, count - i);
        store_raw(maxima + i, max(load_raw<I32>(maxima + i), magnitude(v)));
      }
    for (int64_t i = 0; i < count; ++i) scale[i] = scale_of(absmaxes[begin + i] = as_float(maxima[i]));
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = x + r * k + begin;
      int8_t* out = values + r * k + begin;
      int64_t i = 0;
      for (; i + W <= count; i += W) store_i8(out + i, quantized(load(p + i), load(scale + i)));
      if (i < count)
        store_i8_part(out + i, quantized(load_part(p + i, count - i), load_part(scale + i, count - i)), count - i);
    }
  }
}

template <class T>
static void quantize_columns(const void* x, int64_t rows, int64_t k, int8_t* values, float* absmaxes) {
  parallel_for(k, (1 << 14) / (rows + 1) + 64, [&](int64_t first, int64_t last) {
    quantize_strip(static_cast<const T*>(x), rows, k, first, last, values, absmaxes);
  });
}

void quantize_int8_columns(DType dtype, const void* x, int64_t rows, int64_t k, int8_t* values, float* absmaxes) {
  QUANTLIB_BY_DTYPE(dtype, quantize_columns, x, rows, k, values, absmaxes);
}

SIMD_INLINE F32 load(const int8_t* p) { return __builtin_convertvector(load_raw<I8>(p), F32); }

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

// x after quantization. The outlier columns as float, [m, ldo], padded with zeros; ldo is 0 if there are none.
struct Activations {
  const int8_t* q;
  const float* absmax;
  const int64_t* columns;
  int64_t count, ldo;
  const float* outliers;
};

template <class T>
static void finish_row(const LinearInt8& a, int64_t m, int64_t n, float* row, int64_t count) {
  if (a.bias)
    for (int64_t j = 0; j < count; ++j) row[j] += widen(static_cast<const T*>(a.bias)[n + j]);
  convert(row, count, static_cast<T*>(a.y) + m * a.n + n);
}

static void multiply_int8(const LinearInt8& a, const Activations& x, int64_t first, int64_t last) {
  constexpr float kStep2 = float(1.0 / (127.0 * 127.0));
  const Scratch<float> panel(0, kPanel * x.ldo);
  for (int64_t n = first; n < last; n += kPanel) {
    const int64_t rows = last - n < kPanel ? last - n : kPanel;
    const int8_t* w = a.w + n * a.k;
    int32_t row_sums[kPanel];
    if (kInt8NeedsRowSums)
      for (int64_t r = 0; r < rows; ++r) row_sums[r] = row_sum(w + r * a.k, a.k);
    for (int64_t r = 0; r < kPanel && x.ldo; ++r) {
      float* row = panel + r * x.ldo;
      __builtin_memset(row, 0, sizeof(float) * x.ldo);
      for (int64_t c = 0; c < x.count && r < rows; ++c)
        row[c] = float(w[r * a.k + x.columns[c]]) * a.w_absmax[n + r] * kStep;
    }
    for (int64_t m = 0; m < a.m; m += kTileM) {
      const int64_t count = a.m - m < kTileM ? a.m - m : kTileM;
      int32_t acc[kTileM][kPanel];
      float out[kTileM][kPanel], extra[kTileM][kPanel];
      for (int64_t r = 0; r < rows; r += kTileN) {
        const int64_t columns = rows - r < kTileN ? rows - r : kTileN;
        dot_rows_int8(x.q + m * a.k, w + r * a.k, a.k, count, columns, acc[0] + r, kPanel);
        if (x.ldo)
          dot_rows(x.outliers + m * x.ldo, x.ldo, panel + r * x.ldo, x.ldo, x.ldo, count, extra[0] + r, kPanel);
      }
      for (int64_t i = 0; i < count; ++i) {
        const float x_absmax = x.absmax[m + i];
        for (int64_t j = 0; j < rows; ++j) {
          const int32_t total = kInt8NeedsRowSums ? acc[i][j] - int32_t(128u * uint32_t(row_sums[j])) : acc[i][j];
          out[i][j] = float(total) * (x_absmax * a.w_absmax[n + j]) * kStep2;
        }
        for (int64_t j = 0; j < rows && x.ldo; ++j) out[i][j] += extra[i][j];
        QUANTLIB_BY_DTYPE(a.dtype, finish_row, a, m + i, n, out[i], rows);
      }
    }
  }
}

template <class T>
static void gather_columns(const void* source, int64_t m, int64_t k, const int64_t* columns, int64_t count, int64_t ldo,
                           float* out) {
  const T* x = static_cast<const T*>(source);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < count; ++c) out[r * ldo + c] = widen(x[r * k + columns[c]]);
    for (int64_t c = count; c < ldo; ++c) out[r * ldo + c] = 0;
  }
}

void linear_int8(const LinearInt8& a) {
  const Scratch<int8_t> q(1, a.m * a.k);
  const Scratch<float> absmaxes(2, a.m);
  const bool split = a.threshold > 0;
  const Scratch<uint8_t> mask(3, split ? a.k : 0);
  if (split) __builtin_memset(mask, 0, a.k);
  QUANTLIB_ISA::quantize_int8_rows(a.dtype, a.x, a.m, a.k, a.threshold, q, absmaxes, split ? (uint8_t*)mask : nullptr);
  const Scratch<int64_t> columns(4, split ? a.k : 0);
  int64_t count = 0;
  for (int64_t c = 0; c < a.k && split; ++c)
    if (mask[c]) columns[count++] = c;
  const int64_t ldo = (count + dot_step<float>() - 1) / dot_step<float>() * dot_step<float>();
  const Scratch<float> outliers(5, a.m * ldo);
  if (count) {
    QUANTLIB_BY_DTYPE(a.dtype, gather_columns, a.x, a.m, a.k, columns, count, ldo, outliers);
  }
  const Activations x{q, absmaxes, columns, count, ldo, outliers};
  parallel_for((a.n + kTileN - 1) / kTileN, 1, [&](int64_t first, int64_t last) {
    multiply_int8(a, x, first * kTileN, last * kTileN < a.n ? last * kTileN : a.n);
  });
}

struct RowsInt8 {
  const int8_t* values;
  const float* absmax;
  int64_t k;

  template <class E>
  SIMD_INLINE_MEMBER void decode(int64_t row, int64_t begin, int64_t end, E* out) const {
    dequantize_run(values + row * k + begin, absmax + row, false, end - begin, out);
  }
};

void linear_int8_dx(const LinearInt8& a) {
  const RowsInt8 w{a.w, a.w_absmax, a.k};
  multiply(a.dtype, {a.x, nullptr, a.m, a.k, a.n, a.y}, [&](int64_t, int64_t) { return ColumnPanels<RowsInt8>{w}; });
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
