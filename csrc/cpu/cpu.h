// What the CPU kernels offer to ops.cpp, and the little they need from it. No torch here.
#pragma once

#include <cstdint>
#include <cstring>

#include "../codebooks.h"

namespace quantlib {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

enum class DType { f32, f16, bf16 };
// onednn: the kernels of avx512bf16, except that products of many rows of bfloat16 or int8 are PyTorch's.
enum class Isa { portable, avx2, avx512, avx512bf16, onednn };

// The last one that this CPU can run, and the best one: oneDNN's only where it has AMX, which these kernels do not use.
Isa last_isa();
Isa best_isa();
// The one in force: the best unless set_isa chose another.
Isa isa();
void set_isa(Isa isa);

// Runs f(context, begin, end) over a partition of [0, n) on torch's thread pool; at least `grain` items each, save the
// last of a thread. A thread does its own share in pieces, then what is left of the others', so that none waits for one
// that woke late or runs on a busy core. Defined in ops.cpp.
void parallel(int64_t n, int64_t grain, void (*f)(const void* context, int64_t begin, int64_t end),
              const void* context);
// How many threads it has.
int64_t thread_count();

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  parallel(
      n, grain, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      &f);
}

// Products by PyTorch's oneDNN, all contiguous and none empty. Defined in ops.cpp.
// y[m, n] = x[m, k] w + bias[n] in bfloat16, rounded once: w[n, k], turned, or w[k, n]; bias may be null.
void onednn_linear(const bf16* x, const bf16* w, bool turned, const bf16* bias, int64_t m, int64_t n, int64_t k,
                   bf16* y);
// y[m, n] = x[m, k] w[n, k]^T, exact.
void onednn_int8(const int8_t* x, const int8_t* w, int64_t m, int64_t n, int64_t k, int32_t* y);
bool has_onednn();
// Whether they are to compute m rows, of bfloat16 or int8. Decoding the weight first must pay: counted, not measured,
// since no CPU with AMX was at hand. PyTorch's int8 product of k = 1 is wrong (2.13).
inline bool by_onednn(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kRows = 32;
  return isa() == Isa::onednn && m >= kRows && n > 0 && k > 1;
}

// Asks for huge pages under a buffer about to be written: 8192 page faults for the 32 MiB of a decoded 4096 x 4096
// weight took 20 ms, ten times what decoding it takes. Does nothing to small buffers.
void expect_writes(void* data, int64_t bytes);

// Memory for a result of at least kBlockBytes, 64-byte aligned, contents undefined. malloc returns what is freed from
// there on to the system at once, so that the pages of the next result are cleared anew: three quarters of the time
// that decoding a 4096 x 4096 weight took. The last block released is kept instead; until it is needed again the system
// may take its pages, as memory that nobody uses. None of more than 256 MiB is kept. What comes back at once (brief)
// may be far larger than asked for.
constexpr int64_t kBlockBytes = int64_t(32) << 20;
struct Block {
  void* data;
  int64_t bytes;
};
Block* acquire_block(int64_t bytes, bool brief = false);
void release_block(Block* block);

// Such a block for a decoded weight or its like, until the end of the scope.
template <class T>
class BriefBlock {
 public:
  explicit BriefBlock(int64_t count) : block_(acquire_block(count * int64_t(sizeof(T)), true)) {}
  ~BriefBlock() { release_block(block_); }
  BriefBlock(const BriefBlock&) = delete;
  BriefBlock& operator=(const BriefBlock&) = delete;
  operator T*() const { return static_cast<T*>(block_->data); }

 private:
  Block* block_;
};

// This thread's reusable buffer number `slot`, 64-byte aligned, contents undefined. Kept between calls, since the
// page faults of a fresh megabyte cost more than the work on it; buffers beyond 32 MiB are given back.
void* acquire_scratch(int slot, int64_t bytes);
void release_scratch(int slot);

template <class T>
class Scratch {
 public:
  Scratch(int slot, int64_t count)
      : slot_(slot), data_(static_cast<T*>(acquire_scratch(slot, count * int64_t(sizeof(T))))) {}
  ~Scratch() { release_scratch(slot_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  int slot_;
  T* data_;
};

// A 4-bit weight: see quantlib/ops.py. absmax, or codes + nested_absmax + nested_codebook + offset.
struct Weight4bit {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* absmax_codes;
  const float* nested_absmax;
  const float* nested_codebook;
  float offset;
  int block_shift;  // log2 of the block size
  Codebook codebook;

  // Two roundings as in bitsandbytes: compiled with -ffp-contract=off.
  float scale(int64_t block) const {
    return absmax ? absmax[block] : nested_codebook[absmax_codes[block]] * nested_absmax[block >> 8] + offset;
  }
};

// All arrays are contiguous; every size may be zero.
void quantize_4bit(DType dtype, const void* x, int64_t n, int block_shift, const Codebook& codebook, uint8_t* packed,
                   float* absmax);
void dequantize_4bit(const Weight4bit& w, int64_t n, DType dtype, void* out);
// out[i] = row indices[i] of the weight, which has `dim` columns.
void embedding_4bit(const Weight4bit& w, const int64_t* indices, int64_t count, int64_t dim, DType dtype, void* out);

// The end of a LoRA branch: y[m, n] += scaling * s[m, rank] b^T, where b[i, j] = b[i * row + j * column], i < n, row or
// column is 1; none with rank 0.
struct Branch {
  int64_t rank = 0;
  const float* s = nullptr;
  DType dtype = DType::f32;
  const void* b = nullptr;  // of type dtype
  int64_t row = 0, column = 0;
  float scaling = 0;
};
// Its beginning: s[m, rank] = x[m, k] a^T, where a[j, i] = a[j * row + i * column], summed in float32.
void lora_s(DType x_dtype, const void* x, int64_t m, int64_t k, DType a_dtype, const void* a, int64_t row,
            int64_t column, int64_t rank, float* s);
// The gradients of its factors and of s, summed in float32: da[rank, k] = scaling * ds^T x, and in one pass over dy
// ds[m, rank] = dy b and db[n, rank] = scaling * dy^T s; null for a ds or db that is not needed, s going with db.
void lora_da(DType dtype, const void* x, int64_t m, int64_t k, const float* ds, int64_t rank, float scaling,
             DType a_dtype, void* da);
void lora_dy(DType dtype, const void* dy, int64_t m, int64_t n, DType b_dtype, const void* b, int64_t rank, float* ds,
             const float* s, float scaling, void* db);
// y[m, n] += the branch.
void add_branch_to(DType dtype, const Branch& branch, int64_t m, int64_t n, void* y);
// y[m, n] += dropout of the branch's rows, each rounded to dtype.
void add_dropped_branch(DType dtype, const Branch& branch, int64_t m, int64_t n, uint64_t seed, double p, void* y);

// y[m, n] = x[m, k] w[n, k]^T + bias[n]; bias may be null.
struct Linear4bit {
  DType dtype;
  const void* x;
  Weight4bit w;
  const void* bias;
  int64_t m, n, k;
  void* y;
  Branch branch = {};
};
void linear_4bit(const Linear4bit& a);
// y[m, k] = x[m, n] w[n, k] + branch: x is the gradient of the output, y that of the input; no bias.
void linear_4bit_dx(const Linear4bit& a);

// Row-wise absmax int8 of x[rows, k]. outliers[k] is null without a threshold, else zeroed by the caller.
void quantize_int8_rows(DType dtype, const void* x, int64_t rows, int64_t k, float threshold, int8_t* values,
                        float* absmax, uint8_t* outliers);
void quantize_int8_blocks(DType dtype, const void* x, int64_t n, int64_t block_size, int8_t* values, float* absmax);
void quantize_int8_columns(DType dtype, const void* x, int64_t rows, int64_t k, int8_t* values, float* absmax);
// Element i of values[n] is scaled by absmax[i / period], or absmax[i % period] if by_column.
void dequantize_int8(const int8_t* values, const float* absmax, bool by_column, int64_t n, int64_t period, DType dtype,
                     void* out);

// y[m, n] = LLM.int8() of x[m, k] and w[n, k] + bias[n]; bias may be null; threshold 0 for no outlier columns.
constexpr int64_t kMaxInt8K = 2147483647 / (127 * 127);
struct LinearInt8 {
  DType dtype;
  const void* x;
  const int8_t* w;
  const float* w_absmax;
  const void* bias;
  float threshold;
  int64_t m, n, k;
  void* y;
  Branch branch = {};
};
void linear_int8(const LinearInt8& a);
// y[m, k] = x[m, n] dequantize(w)[n, k] + branch: the gradient of the input from that of the output; no bias, no
// threshold.
void linear_int8_dx(const LinearInt8& a);

// out = x / (1 - p) where Philox keeps the element, else 0.
void dropout(DType dtype, const void* x, int64_t n, uint64_t seed, double p, void* out);

}  // namespace quantlib
