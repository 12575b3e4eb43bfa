// Dropout with a counter-based generator, so that backward recomputes the mask instead of keeping it.
#ifndef QUANTLIB_ISA
#define QUANTLIB_SELF "dropout.cpp"
#include "each_isa.h"

namespace quantlib {

void dropout(DType dtype, const void* x, int64_t n, uint64_t seed, double p, void* out) {
  QUANTLIB_DISPATCH(dropout)(dtype, x, n, seed, p, out);
}

}  // namespace quantlib
#else

namespace quantlib::QUANTLIB_ISA {

#include "simd.h"

constexpr int64_t kLanes = 64;  // counters at a time; four elements each

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) of counters first, first + 1, ...
SIMD_INLINE void philox(uint64_t first, uint64_t seed, uint32_t (*out)[kLanes]) {
  for (int64_t i = 0; i < kLanes; ++i) {
    out[0][i] = uint32_t(first + i);
    out[1][i] = uint32_t((first + i) >> 32);
    out[2][i] = out[3][i] = 0;
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t a = uint64_t(0xD2511F53) * out[0][i], b = uint64_t(0xCD9E8D57) * out[2][i];
      out[0][i] = uint32_t(b >> 32) ^ out[1][i] ^ key0;
      out[2][i] = uint32_t(a >> 32) ^ out[3][i] ^ key1;
      out[1][i] = uint32_t(b);
      out[3][i] = uint32_t(a);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

template <class T>
static void apply(const void* source, int64_t n, uint64_t seed, uint32_t threshold, float scale, void* target,
                  int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(source);
  T* out = static_cast<T*>(target);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    uint32_t random[4][kLanes];
    philox(uint64_t(chunk) * kLanes, seed, random);
    float factor[4 * kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) factor[4 * i + j] = random[j][i] >> 8 >= threshold ? scale : 0.0f;
    const int64_t begin = chunk * 4 * kLanes;
    const int64_t count = n - begin < 4 * kLanes ? n - begin : 4 * kLanes;
    int64_t i = 0;
    // Dropped elements become +0 by selection, not by a product: Inf * 0 would be NaN.
    for (; i < count; i += W) {
      const F32 f = load(factor + i);
      const bool full = i + W <= count;
      const F32 v = full ? load(x + begin + i) : load_part(x + begin + i, count - i);
      const F32 kept = (F32)((I32)(v * f) & (I32)(f != 0.0f));
      if (full)
        store(out + begin + i, kept);
      else
        store_part(out + begin + i, kept, count - i);
    }
  }
}

void dropout(DType dtype, const void* x, int64_t n, uint64_t seed, double p, void* out) {
  // u >= p with u = r * 2^-24 exactly, as an integer comparison.
  const double scaled = p * 0x1p24;
  uint32_t threshold = uint32_t(scaled);
  threshold += threshold < scaled;
  const float scale = float(1.0 / (1.0 - p));
  parallel_for((n + 4 * kLanes - 1) / (4 * kLanes), 64, [&](int64_t first, int64_t last) {
    QUANTLIB_BY_DTYPE(dtype, apply, x, n, seed, threshold, scale, out, first, last);
  });
}

}  // namespace quantlib::QUANTLIB_ISA
#endif
