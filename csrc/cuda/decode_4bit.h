// Decoding 4-bit weights, one value at a time; runs on the host too, so that tests need no GPU.
#pragma once

#include <cstdint>

#include "codebooks.h"

namespace quantlib {

constexpr int kNestedShift = 8;  // double quantization has blocks of 256

// nvcc contracts a * b + c to one rounding, which the format forbids; so do these not.
// On the host, -ffp-contract=off does the same.
QUANTLIB_HOST_DEVICE inline float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

QUANTLIB_HOST_DEVICE inline float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// Absmax of each block, as float32, or as 8-bit codes under double quantization.
struct Absmax {
  const float* values;           // [blocks]; null under double quantization, where the rest is set
  const uint8_t* codes;          // [blocks]
  const float* nested_absmax;    // [ceil(blocks / 256)]
  const float* nested_codebook;  // [256]
  const float* offset;           // [1]
};

template <bool kDoubleQuant>
QUANTLIB_HOST_DEVICE inline float block_absmax(const Absmax& absmax, int64_t block) {
  if (!kDoubleQuant) return absmax.values[block];
  const float code = absmax.nested_codebook[absmax.codes[block]];
  return add(multiply(code, absmax.nested_absmax[block >> kNestedShift]), *absmax.offset);
}

// Value of element `i` in a word of eight elements, packed low byte first and high nibble first.
QUANTLIB_HOST_DEVICE inline float decode(uint32_t word, int i, const float* codebook, float absmax) {
  const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
  return multiply(codebook[(word >> shift) & 15], absmax);
}

// The word at `packed`, of which only `bytes` (1 ... 4) may be read; for addresses that are not aligned.
QUANTLIB_HOST_DEVICE inline uint32_t load_word(const uint8_t* packed, int bytes) {
  uint32_t word = 0;
  for (int i = 0; i < bytes; ++i) word |= static_cast<uint32_t>(packed[i]) << (8 * i);
  return word;
}

}  // namespace quantlib
