// One vector of W floats or ints and what the kernels need on it, for the instruction set being compiled.
// Included inside `namespace quantlib::QUANTLIB_ISA` by every kernel file (no include guard on purpose).
// Plain arithmetic and comparisons use the compiler's vector types.

#define SIMD_INLINE static inline __attribute__((always_inline))
#define SIMD_INLINE_MEMBER inline __attribute__((always_inline))

#if QUANTLIB_LEVEL >= 2
constexpr int W = 16;
#elif QUANTLIB_LEVEL == 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * W)));
typedef int32_t I32 __attribute__((vector_size(4 * W)));
typedef uint32_t U32 __attribute__((vector_size(4 * W)));
typedef uint16_t U16 __attribute__((vector_size(2 * W)));
typedef int8_t I8 __attribute__((vector_size(W)));
typedef uint8_t U8 __attribute__((vector_size(W)));

template <class V, class T>
SIMD_INLINE V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class T, class V>
SIMD_INLINE void store_raw(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

SIMD_INLINE F32 set1(float v) { return v - F32{}; }
SIMD_INLINE I32 set1(int32_t v) { return v - I32{}; }
SIMD_INLINE I32 select(I32 mask, I32 a, I32 b) { return (mask & a) | (~mask & b); }

// Conversions round to nearest even and keep subnormals, which vcvtneps2bf16 would flush.
SIMD_INLINE float widen(float v) { return v; }
SIMD_INLINE float widen(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
SIMD_INLINE float widen(f16 v) {
  // Shift the exponent into place, then let one exact multiplication correct its bias and normalise.
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;
  float f;
  if (magnitude >= 0x0f800000) {  // Inf or NaN
    const uint32_t special = magnitude | 0x7f800000;
    __builtin_memcpy(&f, &special, 4);
  } else {
    __builtin_memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
  }
  return v.bits & 0x8000 ? -f : f;
}
SIMD_INLINE void narrow(float f, float* out) { *out = f; }
SIMD_INLINE void narrow(float f, bf16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  out->bits = f != f ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
SIMD_INLINE void narrow(float f, f16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  uint16_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (bits >= 0x38800000) {
    half = uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
  } else {  // subnormal: an addition that leaves the rounded result in the low bits
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    half = uint16_t(bits - 0x3f000000);
  }
  out->bits = uint16_t(sign | half);
}

SIMD_INLINE F32 load(const float* p) { return load_raw<F32>(p); }
SIMD_INLINE F32 load(const bf16* p) { return (F32)(__builtin_convertvector(load_raw<U16>(p), U32) << 16); }
SIMD_INLINE void store(float* p, F32 v) { store_raw(p, v); }
SIMD_INLINE void store(bf16* p, F32 v) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const U32 nan = (U32)(v != v);
  store_raw(p, __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), U16));
}
#if QUANTLIB_LEVEL >= 2
SIMD_INLINE F32 load(const f16* p) { return (F32)_mm512_cvtph_ps(load_raw<__m256i>(p)); }
SIMD_INLINE void store(f16* p, F32 v) { store_raw(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
SIMD_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SIMD_INLINE I32 max(I32 a, I32 b) { return (I32)_mm512_max_epi32((__m512i)a, (__m512i)b); }
SIMD_INLINE I32 round(F32 v) { return (I32)_mm512_cvtps_epi32((__m512)v); }
SIMD_INLINE void store_i8(int8_t* p, I32 v) { store_raw(p, _mm512_cvtepi32_epi8((__m512i)v)); }
SIMD_INLINE float sum(F32 v) { return _mm512_reduce_add_ps((__m512)v); }
SIMD_INLINE int32_t sum(I32 v) { return _mm512_reduce_add_epi32((__m512i)v); }
#elif QUANTLIB_LEVEL == 1
SIMD_INLINE F32 load(const f16* p) { return (F32)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
SIMD_INLINE void store(f16* p, F32 v) { store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
SIMD_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SIMD_INLINE I32 max(I32 a, I32 b) { return (I32)_mm256_max_epi32((__m256i)a, (__m256i)b); }
SIMD_INLINE I32 round(F32 v) { return (I32)_mm256_cvtps_epi32((__m256)v); }
SIMD_INLINE void store_i8(int8_t* p, I32 v) {  // GCC 12 would convert the vector element by element
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
#else
SIMD_INLINE F32 load(const f16* p) {
  F32 v;
  for (int i = 0; i < W; ++i) v[i] = widen(p[i]);
  return v;
}
SIMD_INLINE void store(f16* p, F32 v) {
  for (int i = 0; i < W; ++i) narrow(v[i], p + i);
}
SIMD_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
SIMD_INLINE I32 max(I32 a, I32 b) { return select(a > b, a, b); }
// Adding 1.5 * 2^23 leaves the rounded integer in the low bits, exact for |v| < 2^22.
SIMD_INLINE I32 round(F32 v) { return (I32)(v + 0x1.8p23f) - 0x4b400000; }
#endif
#if QUANTLIB_LEVEL == 0
SIMD_INLINE void store_i8(int8_t* p, I32 v) { store_raw(p, __builtin_convertvector(v, I8)); }
#endif
#if QUANTLIB_LEVEL < 2
template <class V>
SIMD_INLINE auto sum(V v) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
#endif

SIMD_INLINE int32_t max(I32 v) {
  int32_t m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Of a comparison's result.
SIMD_INLINE bool any(I32 mask) {
#if QUANTLIB_LEVEL >= 2
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif QUANTLIB_LEVEL == 1
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return max(mask & 1) != 0;
#endif
}

// The first n < W elements, the rest zero; and their counterpart.
template <class T>
SIMD_INLINE F32 load_part(const T* p, int64_t n) {
#if QUANTLIB_LEVEL >= 2
  T buffer[W];
  const __mmask16 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4)
    store_raw(buffer, _mm512_maskz_loadu_epi32(mask, p));
  else
    store_raw(buffer, _mm256_maskz_loadu_epi16(mask, p));
#else
  T buffer[W] = {};
  __builtin_memcpy(buffer, p, sizeof(T) * n);
#endif
  return load(buffer);
}
template <class T>
SIMD_INLINE void store_part(T* p, F32 v, int64_t n) {
  T buffer[W];
  store(buffer, v);
  __builtin_memcpy(p, buffer, sizeof(T) * n);
}
SIMD_INLINE void store_i8_part(int8_t* p, I32 v, int64_t n) {
  int8_t buffer[W];
  store_i8(buffer, v);
  __builtin_memcpy(p, buffer, n);
}

// |v| as an integer: ordered like the float, with NaN above Inf, so that a maximum keeps NaN.
constexpr int32_t kInf = 0x7f800000;
SIMD_INLINE I32 magnitude(F32 v) { return (I32)v & 0x7fffffff; }
SIMD_INLINE float as_float(int32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
SIMD_INLINE int32_t as_int(float f) {
  int32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}
SIMD_INLINE int32_t magnitude(float f) { return as_int(f) & 0x7fffffff; }

template <class T>
static float absmax(const T* x, int64_t n) {
  I32 m = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) m = max(m, magnitude(load(x + i)));
  if (i < n) m = max(m, magnitude(load_part(x + i, n - i)));
  return as_float(max(m));
}
#if QUANTLIB_LEVEL >= 2
template <>
inline float absmax(const bf16* x, int64_t n) {
  __m512i m = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 some = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
    m = _mm512_max_epu16(m, _mm512_and_si512(_mm512_maskz_loadu_epi16(some, x + i), _mm512_set1_epi16(0x7fff)));
  }
  return as_float(max(max((I32)_mm512_slli_epi32(m, 16), (I32)m & int32_t(0xffff0000))));
}
#endif

// Rounds in[i], times scale[i] if there are scales.
template <class A, class B>
SIMD_INLINE void convert(const A* in, int64_t n, B* out, const float* scale = nullptr) {
  if constexpr (__is_same(A, B))
    if (!scale) {
      __builtin_memcpy(out, in, sizeof(A) * n);
      return;
    }
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, scale ? load(in + i) * load(scale + i) : load(in + i));
  for (; i < n; ++i) narrow(scale ? widen(in[i]) * scale[i] : widen(in[i]), out + i);
}

// Calls f<T>(arguments) for the C++ type of a DType; f is a function template.
#define QUANTLIB_BY_DTYPE(dtype, f, ...)           \
  switch (dtype) {                                 \
    case DType::f32: f<float>(__VA_ARGS__); break; \
    case DType::f16: f<f16>(__VA_ARGS__); break;   \
    case DType::bf16: f<bf16>(__VA_ARGS__); break; \
  }
