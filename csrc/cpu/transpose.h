// Turns small matrices in registers. Included per instruction set after simd.h.

// A lane-wise transpose of W rows: rows [i * ldr + step] ^ flip -> out [step * stride + i]; rows after `last` repeat
// it. Fills whole groups of W steps, with `flip` at the end.
SIMD_INLINE void transpose(const uint32_t* rows, int64_t ldr, int64_t last, int64_t steps, uint32_t* out,
                           int64_t stride, uint32_t flip = 0) {
#if QUANTLIB_LEVEL >= 2
  for (int64_t s = 0; s < steps; s += 16) {
    const __mmask16 mask = steps - s < 16 ? (1u << (steps - s)) - 1 : 0xffff;
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      a[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi32(mask, rows + (i < last ? i : last) * ldr + s),
                              _mm512_set1_epi32(int(flip)));
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
      _mm512_storeu_si512(out + (s + i) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
      _mm512_storeu_si512(out + (s + 8 + i) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
      _mm512_storeu_si512(out + (s + 4 + i) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
      _mm512_storeu_si512(out + (s + 12 + i) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
  }
#elif QUANTLIB_LEVEL == 1
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t s = 0; s < steps; s += 8) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(steps - s < 8 ? int(steps - s) : 8), lane);
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      a[i] = _mm256_xor_ps(
          _mm256_maskload_ps(reinterpret_cast<const float*>(rows) + (i < last ? i : last) * ldr + s, mask),
          _mm256_castsi256_ps(_mm256_set1_epi32(int(flip))));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* const to = reinterpret_cast<float*>(out) + (s + i) * stride;
      _mm256_storeu_ps(to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      _mm256_storeu_ps(to + 4 * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
#else
  for (int64_t s = 0; s < (steps + W - 1) / W * W; ++s)
    for (int i = 0; i < W; ++i) out[s * stride + i] = (s < steps ? rows[(i < last ? i : last) * ldr + s] : 0) ^ flip;
#endif
}

#if QUANTLIB_LEVEL == 3
// The same for 8 rows of lanes of 64 bits: row i begins i * row_bytes later.
SIMD_INLINE void transpose64(const uint8_t* rows, int64_t row_bytes, int64_t last, int64_t steps, uint64_t* out,
                             int64_t stride) {
  for (int64_t s = 0; s < steps; s += 8) {
    const __mmask8 mask = steps - s < 8 ? (1u << (steps - s)) - 1 : 0xff;
    __m512i a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = _mm512_maskz_loadu_epi64(mask, rows + (i < last ? i : last) * row_bytes + 8 * s);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm512_unpacklo_epi64(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      a[i] = _mm512_shuffle_i32x4(b[i], b[i + 2], 0x88);
      a[i + 2] = _mm512_shuffle_i32x4(b[i], b[i + 2], 0xdd);
      a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 6], 0x88);
      a[i + 6] = _mm512_shuffle_i32x4(b[i + 4], b[i + 6], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(out + (s + i) * stride, _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88));
      _mm512_storeu_si512(out + (s + 4 + i) * stride, _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd));
    }
  }
}
#endif
