// Decodes NF4 and FP4 to a float tensor, one rounding per element.
//
// Compiled for every architecture on each build, but not yet run on a GPU.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "codebooks.h"
#include "kernels.h"

namespace quantlib {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerThread = 4;  // loads in flight per thread
constexpr int kElementsPerWord = 8;

template <typename T>
__device__ T round_to(float value);
template <>
__device__ float round_to(float value) {
  return value;
}
template <>
__device__ __half round_to(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __nv_bfloat16 round_to(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
struct alignas(16) Vector {
  T values[16 / sizeof(T)];
};

// Each thread decodes words of eight elements, a block's width apart: loads of 4 and stores of 16 bytes are then
// contiguous across a warp. A word lies in one quantization block, whose size is at least 32.
template <typename T, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads)
    dequantize(const __grid_constant__ Weight4bit weight, const __grid_constant__ Codebook codebook, bool aligned,
               T* __restrict__ out) {
  // 16 floats lie in 16 banks: threads that look up different codes never wait for one another.
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = codebook.code[threadIdx.x];
  __syncthreads();

  const int64_t words = weight.n / kElementsPerWord;
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kWordsPerThread) + threadIdx.x;
  uint32_t word[kWordsPerThread];
  float absmax[kWordsPerThread];
#pragma unroll
  for (int k = 0; k < kWordsPerThread; ++k) {
    const int64_t index = first + k * kThreads;
    if (index >= words) continue;
    word[k] = aligned ? __ldg(reinterpret_cast<const uint32_t*>(weight.packed) + index)
                      : load_word(weight.packed + 4 * index, 4);
    absmax[k] = block_absmax<kDoubleQuant>(weight.absmax, index * kElementsPerWord >> weight.block_shift);
  }
  constexpr int kPerStore = 16 / sizeof(T);
#pragma unroll
  for (int k = 0; k < kWordsPerThread; ++k) {
    const int64_t index = first + k * kThreads;
    if (index >= words) continue;
    Vector<T>* target = reinterpret_cast<Vector<T>*>(out + index * kElementsPerWord);
#pragma unroll
    for (int part = 0; part < kElementsPerWord / kPerStore; ++part) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kPerStore; ++i)
        vector.values[i] = round_to<T>(decode(word[k], part * kPerStore + i, table, absmax[k]));
      target[part] = vector;
    }
  }

  // The last, incomplete word: one thread per element.
  const int64_t element = words * kElementsPerWord + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && element < weight.n) {
    const uint32_t byte = weight.packed[element / 2];
    const float scale = block_absmax<kDoubleQuant>(weight.absmax, element >> weight.block_shift);
    out[element] = round_to<T>(decode(byte, element % 2, table, scale));
  }
}

template <typename T>
cudaError_t launch(const Weight4bit& weight, void* out, cudaStream_t stream) {
  const Codebook codebook = weight.fp4 ? fp4_codebook() : nf4_codebook();
  const int64_t words = weight.n / kElementsPerWord;
  const int64_t per_block = kThreads * kWordsPerThread;
  const unsigned blocks = static_cast<unsigned>(std::max<int64_t>(1, (words + per_block - 1) / per_block));
  const bool aligned = reinterpret_cast<uintptr_t>(weight.packed) % 4 == 0;
  const auto kernel = weight.absmax.values ? dequantize<T, false> : dequantize<T, true>;
  kernel<<<blocks, kThreads, 0, stream>>>(weight, codebook, aligned, static_cast<T*>(out));
  return cudaGetLastError();
}

}  // namespace

cudaError_t dequantize_4bit(const Weight4bit& weight, Float dtype, void* out, cudaStream_t stream) {
  switch (dtype) {
    case Float::kFloat32: return launch<float>(weight, out, stream);
    case Float::kFloat16: return launch<__half>(weight, out, stream);
    case Float::kBFloat16: return launch<__nv_bfloat16>(weight, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace quantlib
