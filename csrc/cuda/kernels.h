// The CUDA kernels as ops.cpp calls them: raw pointers on the device, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "decode_4bit.h"

namespace quantlib {

enum class Float { kFloat32, kFloat16, kBFloat16 };

struct Weight4bit {
  const uint8_t* packed;  // [ceil(n / 2)]
  Absmax absmax;
  bool fp4;         // else NF4
  int block_shift;  // log2 of the block size
  int64_t n;        // elements, at least 1
};

// Writes the n elements of `weight` to `out`, which is aligned to 16 bytes.
cudaError_t dequantize_4bit(const Weight4bit& weight, Float dtype, void* out, cudaStream_t stream);

}  // namespace quantlib
