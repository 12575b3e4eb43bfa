// Registers the CPU kernels for the ops that quantlib/ops.py declares, through PyTorch's stable ABI, and makes the
// Python module quantlib._C. The only file that knows torch. Checks here are what memory safety needs; the
// friendly ones are Python's.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/cpu.h"

// Since PyTorch 2.11; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* out, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*release)(void* data, void* context), void* context);

// Not in every PyTorch.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle a,
                                                           AtenTensorHandle b);
__attribute__((weak)) AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle c,
                                                              AtenTensorHandle a, AtenTensorHandle b, double beta,
                                                              double alpha);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__int_mm_out(AtenTensorHandle out, AtenTensorHandle a,
                                                                AtenTensorHandle b);
}

namespace quantlib {

namespace {

// The part of [0, n) that belongs to one thread, of which `next` pieces are taken.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
};

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel(int64_t n, int64_t grain, void (*f)(const void* context, int64_t begin, int64_t end),
              const void* context) {
  constexpr int64_t kPieces = 8;
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t threads = std::min(thread_count(), (n + grain - 1) / grain);
  if (threads <= 1) return f(context, 0, n);
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  const auto take_from = [&](int64_t owner) {
    const int64_t begin = n * owner / threads, end = n * (owner + 1) / threads;
    const int64_t piece = std::max(grain, (end - begin + kPieces - 1) / kPieces);
    std::atomic<int64_t>& next = shares[owner].next;
    while (begin + next.load(std::memory_order_relaxed) * piece < end) {  // looking is cheap, taking is not
      const int64_t first = begin + next.fetch_add(1, std::memory_order_relaxed) * piece;
      if (first < end) f(context, first, std::min(first + piece, end));
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own)
      for (int64_t i = 0; i < threads; ++i) take_from((own + i) % threads);
  });
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// A tensor that borrows its data: rows x columns, stored row by row, or column by column if turned.
Tensor matrix(const void* data, int64_t rows, int64_t columns, int32_t dtype, bool turned = false) {
  const int64_t sizes[] = {rows, columns}, strides[] = {turned ? 1 : columns, turned ? rows : 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 2, sizes, strides, 0, dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace

bool has_onednn() { return aoti_torch_cpu_mm_out && aoti_torch_cpu_addmm_out && aoti_torch_cpu__int_mm_out; }

// Beneath autograd and autocast, which must not look at these tensors.
void onednn_linear(const bf16* x_, const bf16* w_, bool turned, const bf16* bias_, int64_t m, int64_t n, int64_t k,
                   bf16* y_) {
  const int32_t dtype = aoti_torch_dtype_bfloat16();
  const Tensor x = matrix(x_, m, k, dtype), w = matrix(w_, k, n, dtype, turned), y = matrix(y_, m, n, dtype);
  if (bias_) {
    const Tensor bias = matrix(bias_, 1, n, dtype);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), bias.get(), x.get(), w.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), x.get(), w.get()));
  }
}

void onednn_int8(const int8_t* x_, const int8_t* w_, int64_t m, int64_t n, int64_t k, int32_t* y_) {
  const Tensor x = matrix(x_, m, k, aoti_torch_dtype_int8()), w = matrix(w_, k, n, aoti_torch_dtype_int8(), true);
  const Tensor y = matrix(y_, m, n, aoti_torch_dtype_int32());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__int_mm_out(y.get(), x.get(), w.get()));
}

namespace {

DType dtype_of(ScalarType type, const char* op) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, op, ": the dtype must be float32, float16 or bfloat16");
  }
}
DType dtype_of(const Tensor& x, const char* op) { return dtype_of(x.scalar_type(), op); }

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// `x` contiguous and of the type that the kernel will read it as.
Tensor input(const Tensor& x, ScalarType type, int64_t least, const char* op, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(x.numel() >= least, op, ": ", name, " has ", x.numel(), " elements, needs ", least);
  return dense(x);
}

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Tensor out = torch::stable::new_empty(like, sizes, type);
  expect_writes(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

int64_t product(const Sizes& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "sizes must not be negative");
    n *= size;
  }
  return n;
}

// A result that may be a whole weight: in a reused block if it is large, where PyTorch (2.11 on) can own one.
Tensor empty_weight(const Tensor& like, const Sizes& sizes, ScalarType type) {
  const int64_t bytes = product(sizes) * (type == ScalarType::Float ? 4 : 2);
  if (bytes < kBlockBytes || !torch_from_blob) return empty(like, sizes, type);
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
  const int32_t dtype = type == ScalarType::Float  ? aoti_torch_dtype_float32()
                        : type == ScalarType::Half ? aoti_torch_dtype_float16()
                                                   : aoti_torch_dtype_bfloat16();
  Block* const block = acquire_block(bytes);
  const auto release = [](void*, void* block) { release_block(static_cast<Block*>(block)); };
  AtenTensorHandle handle;
  const auto failed = torch_from_blob(block->data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype,
                                      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr,
                                      0, release, block);
  if (failed) release_block(block);
  STD_TORCH_CHECK(!failed, "PyTorch did not take a result of ", bytes, " bytes");
  return Tensor(handle);
}

Sizes with_last(const Tensor& x, int64_t size) {
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  STD_TORCH_CHECK(!sizes.empty(), "the input needs at least one dimension");
  sizes.back() = size;
  return sizes;
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

Codebook codebook_of(const std::string& quant_type, const char* op) {
  STD_TORCH_CHECK(quant_type == "nf4" || quant_type == "fp4", op, ": unknown quant_type ", quant_type);
  return quant_type == "nf4" ? nf4_codebook() : fp4_codebook();
}

int shift_of(int64_t block_size, const char* op) {
  int shift = 5;
  while (shift < 12 && int64_t(1) << shift < block_size) ++shift;
  STD_TORCH_CHECK(int64_t(1) << shift == block_size, op, ": block_size must be a power of two in 32 ... 4096");
  return shift;
}

// The seven arguments of a 4-bit weight of n elements, checked, with the tensors kept alive.
struct Weight {
  Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_codebook;
  Weight4bit view;

  Weight(const Tensor& packed_, const Tensor& absmax_, const OptionalTensor& nested_absmax_,
         const OptionalTensor& nested_codebook_, const OptionalTensor& offset_, const std::string& quant_type,
         int64_t block_size, int64_t n, const char* op)
      : packed(input(packed_, ScalarType::Byte, (n + 1) / 2, op, "packed")), absmax(absmax_), view{} {
    view.block_shift = shift_of(block_size, op);
    view.codebook = codebook_of(quant_type, op);
    view.packed = packed.const_data_ptr<uint8_t>();
    const int64_t blocks = (n + block_size - 1) / block_size;
    if (!nested_absmax_) {
      absmax = input(absmax_, ScalarType::Float, blocks, op, "absmax");
      view.absmax = absmax.const_data_ptr<float>();
      return;
    }
    STD_TORCH_CHECK(nested_codebook_ && offset_, op, ": nested_absmax needs nested_codebook and offset");
    absmax = input(absmax_, ScalarType::Byte, blocks, op, "absmax");
    nested_absmax = input(*nested_absmax_, ScalarType::Float, (blocks + 255) / 256, op, "nested_absmax");
    nested_codebook = input(*nested_codebook_, ScalarType::Float, 256, op, "nested_codebook");
    const Tensor offset = input(*offset_, ScalarType::Float, 1, op, "offset");
    view.absmax_codes = absmax.const_data_ptr<uint8_t>();
    view.nested_absmax = nested_absmax->const_data_ptr<float>();
    view.nested_codebook = nested_codebook->const_data_ptr<float>();
    view.offset = *offset.const_data_ptr<float>();
  }
};

std::tuple<Tensor, Tensor> quantize_4bit_op(const Tensor& x_, std::string quant_type, int64_t block_size) {
  const DType dtype = dtype_of(x_, "quantize_4bit");
  const int shift = shift_of(block_size, "quantize_4bit");
  const Codebook codebook = codebook_of(quant_type, "quantize_4bit");
  const Tensor x = dense(x_);
  const int64_t n = x.numel();
  Tensor packed = empty(x, {(n + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = empty(x, {(n + block_size - 1) / block_size}, ScalarType::Float);
  quantize_4bit(dtype, x.const_data_ptr(), n, shift, codebook, packed.mutable_data_ptr<uint8_t>(),
                absmax.mutable_data_ptr<float>());
  return {packed, absmax};
}

Tensor dequantize_4bit_op(const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                          OptionalTensor nested_codebook, OptionalTensor offset, std::string quant_type,
                          int64_t block_size, Sizes shape, ScalarType type) {
  const DType dtype = dtype_of(type, "dequantize_4bit");
  const int64_t n = product(shape);
  const Weight w(packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size, n, "dequantize_4bit");
  Tensor out = empty_weight(packed, shape, type);
  dequantize_4bit(w.view, n, dtype, out.mutable_data_ptr());
  return out;
}

// bias in the dtype of x, contiguous; null without one.
OptionalTensor bias_for(const OptionalTensor& bias, const Tensor& x, int64_t n, const char* op) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->numel() == n, op, ": bias has ", bias->numel(), " elements, out_features is ", n);
  return dense(bias->scalar_type() == x.scalar_type() ? *bias : torch::stable::to(*bias, x.scalar_type()));
}

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

Tensor dropout_op(const Tensor& x_, const Tensor& seed, double p) {
  const DType dtype = dtype_of(x_, "dropout");
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout: p is ", p, ", must be in [0, 1)");
  const Tensor key = input(seed, ScalarType::Long, 1, "dropout", "seed");
  const Tensor x = dense(x_);
  Tensor out = empty(x, Sizes(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  dropout(dtype, x.const_data_ptr(), x.numel(), uint64_t(*key.const_data_ptr<int64_t>()), p, out.mutable_data_ptr());
  return out;
}

// The rank of a LoRA branch a[rank, k], b[n, rank], checked.
int64_t rank_of(const char* op, const Tensor& a, const Tensor& b, int64_t n, int64_t k) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, op, ": a and b must be matrices");
  const int64_t rank = a.size(0);
  STD_TORCH_CHECK(rank > 0 && a.size(1) == k, op, ": a must be [rank, ", k, "]");
  STD_TORCH_CHECK(b.size(0) == n && b.size(1) == rank, op, ": b must be [", n, ", ", rank, "]");
  return rank;
}

// The LoRA branch of a linear op, with s = dropout(x) a^T computed.
struct LoraBranch {
  Tensor s, b;
  Branch view;

  LoraBranch(const Tensor& x, int64_t out_features, const Tensor& a_, const Tensor& b_, double scaling,
             const OptionalTensor& seed, double p, const char* op)
      : s(x), b(dense(b_)), view{} {
    STD_TORCH_CHECK(x.dim() > 0, op, ": the input needs at least one dimension");
    const int64_t k = x.size(x.dim() - 1), m = rows_of(x), rank = rank_of(op, a_, b_, out_features, k);
    const Tensor a = dense(a_);
    const Tensor dropped = seed ? dropout_op(x, *seed, p) : x;
    s = torch::stable::new_empty(x, with_last(x, rank), ScalarType::Float);
    float* const data = s.mutable_data_ptr<float>();
    lora_s(dtype_of(x, op), dropped.const_data_ptr(), m, k, dtype_of(a, op), a.const_data_ptr(), k, 1, rank, data);
    view = {rank, data, dtype_of(b, op), b.const_data_ptr(), rank, 1, float(scaling)};
  }
  Tensor kept(const Tensor& x, bool keep) const {
    return keep ? torch::stable::to(s, x.scalar_type()) : torch::stable::new_empty(x, {0});
  }
};

Tensor linear_4bit_of(const char* op, const Tensor& x, const Weight4bit& w, int64_t out_features,
                      const OptionalTensor& bias_, const Branch& branch) {
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1);
  Tensor y = empty(x, with_last(x, out_features), x.scalar_type());
  const OptionalTensor bias = bias_for(bias_, x, out_features, op);
  linear_4bit(
      {dtype_of(x, op), x.const_data_ptr(), w, data_or_null(bias), m, out_features, k, y.mutable_data_ptr(), branch});
  return y;
}

Tensor linear_4bit_op(const Tensor& x_, const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                      OptionalTensor nested_codebook, OptionalTensor offset, std::string quant_type, int64_t block_size,
                      int64_t out_features, OptionalTensor bias) {
  STD_TORCH_CHECK(x_.dim() > 0, "linear_4bit: x needs at least one dimension");
  const Tensor x = dense(x_);
  const Weight w(packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size,
                 out_features * x.size(x.dim() - 1), "linear_4bit");
  return linear_4bit_of("linear_4bit", x, w.view, out_features, bias, {});
}

// The gradients of a linear op with its LoRA branch for x, a and b; those not needed are empty. s: dropout(x) a^T.
// base_dx(dy, branch, dx) writes dy W + branch.
template <class BaseDx>
std::tuple<Tensor, Tensor, Tensor> lora_backward(const char* op, const Tensor& dy_, const Tensor& x_, const Tensor& s_,
                                                 const Tensor& a_, const Tensor& b_, double scaling,
                                                 const OptionalTensor& seed, double p, const std::vector<bool>& needed,
                                                 const BaseDx& base_dx) {
  const DType dtype = dtype_of(x_, op);
  STD_TORCH_CHECK(x_.dim() > 0 && dy_.dim() > 0 && needed.size() == 3, op, ": x and dy must have rows, needed 3 flags");
  const Tensor dy = dense(dy_), x = dense(x_), a = dense(a_), b = dense(b_);
  const int64_t m = rows_of(x), n = dy.size(dy.dim() - 1), k = x.size(x.dim() - 1), rank = rank_of(op, a, b, n, k);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && rows_of(dy) == m, op, ": dy must have the rows of x");
  STD_TORCH_CHECK(s_.numel() == m * rank, op, ": s must be [", m, ", ", rank, "]");
  const auto result = [&](bool wanted, const Tensor& t) {
    return wanted ? empty(t, Sizes(t.sizes().begin(), t.sizes().end()), t.scalar_type())
                  : torch::stable::new_empty(t, {0});
  };
  Tensor dx = result(needed[0], x), da = result(needed[1], a), db = result(needed[2], b);
  Tensor ds = torch::stable::new_empty(x, {m, rank}, ScalarType::Float);  // without the scaling
  const OptionalTensor s = needed[2] ? OptionalTensor(dense(torch::stable::to(s_, ScalarType::Float))) : std::nullopt;
  lora_dy(dtype, dy.const_data_ptr(), m, n, dtype_of(b, op), b.const_data_ptr(), rank,
          needed[0] || needed[1] ? ds.mutable_data_ptr<float>() : nullptr, s ? s->const_data_ptr<float>() : nullptr,
          float(scaling), s ? db.mutable_data_ptr() : nullptr);
  if (needed[0]) {
    const Branch branch{rank, ds.const_data_ptr<float>(), dtype_of(a, op), a.const_data_ptr(), 1, k, float(scaling)};
    base_dx(dy, seed ? Branch{} : branch, dx);
    if (seed) {
      const Tensor key = input(*seed, ScalarType::Long, 1, op, "seed");
      add_dropped_branch(dtype, branch, m, k, uint64_t(*key.const_data_ptr<int64_t>()), p, dx.mutable_data_ptr());
    }
  }
  if (needed[1]) {
    const Tensor dropped = seed ? dropout_op(x, *seed, p) : x;
    lora_da(dtype, dropped.const_data_ptr(), m, k, ds.const_data_ptr<float>(), rank, float(scaling), dtype_of(a, op),
            da.mutable_data_ptr());
  }
  return {dx, da, db};
}

std::tuple<Tensor, Tensor> lora_linear_4bit_op(const Tensor& x_, const Tensor& packed, const Tensor& absmax,
                                               OptionalTensor nested_absmax, OptionalTensor nested_codebook,
                                               OptionalTensor offset, std::string quant_type, int64_t block_size,
                                               OptionalTensor bias, const Tensor& a, const Tensor& b, double scaling,
                                               OptionalTensor seed, double p, bool keep_s) {
  const Tensor x = dense(x_);
  const LoraBranch branch(x, b.size(0), a, b, scaling, seed, p, "lora_linear_4bit");
  const Weight w(packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size,
                 b.size(0) * x.size(x.dim() - 1), "lora_linear_4bit");
  const Tensor y = linear_4bit_of("lora_linear_4bit", x, w.view, b.size(0), bias, branch.view);
  return {y, branch.kept(x, keep_s)};
}

Tensor linear_4bit_dx_op(const Tensor& dy_, const Tensor& packed, const Tensor& absmax, OptionalTensor nested_absmax,
                         OptionalTensor nested_codebook, OptionalTensor offset, std::string quant_type,
                         int64_t block_size, int64_t in_features) {
  const DType dtype = dtype_of(dy_, "linear_4bit_dx");
  Tensor dx = empty(dy_, with_last(dy_, in_features), dy_.scalar_type());
  const int64_t m = rows_of(dy_), n = dy_.size(dy_.dim() - 1);
  const Weight w(packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size, n * in_features,
                 "linear_4bit_dx");
  const Tensor dy = dense(dy_);
  linear_4bit_dx({dtype, dy.const_data_ptr(), w.view, nullptr, m, n, in_features, dx.mutable_data_ptr()});
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_4bit_backward_op(
    const Tensor& dy, const Tensor& x, const Tensor& s, const Tensor& packed, const Tensor& absmax,
    OptionalTensor nested_absmax, OptionalTensor nested_codebook, OptionalTensor offset, std::string quant_type,
    int64_t block_size, const Tensor& a, const Tensor& b, double scaling, OptionalTensor seed, double p,
    std::vector<bool> needed) {
  constexpr const char* op = "lora_linear_4bit_backward";
  return lora_backward(
      op, dy, x, s, a, b, scaling, seed, p, needed, [&](const Tensor& dy, const Branch& branch, Tensor& dx) {
        const int64_t n = b.size(0), k = a.size(1);
        const Weight w(packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size, n * k, op);
        linear_4bit_dx(
            {dtype_of(dy, op), dy.const_data_ptr(), w.view, nullptr, rows_of(dy), n, k, dx.mutable_data_ptr(), branch});
      });
}

Tensor embedding_4bit_op(const Tensor& indices_, const Tensor& packed, const Tensor& absmax,
                         OptionalTensor nested_absmax, OptionalTensor nested_codebook, OptionalTensor offset,
                         std::string quant_type, int64_t block_size, int64_t num_embeddings, int64_t embedding_dim,
                         ScalarType type) {
  const DType dtype = dtype_of(type, "embedding_4bit");
  const Weight w(packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size,
                 num_embeddings * embedding_dim, "embedding_4bit");
  const Tensor indices =
      dense(indices_.scalar_type() == ScalarType::Long ? indices_ : torch::stable::to(indices_, ScalarType::Long));
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t count = indices.numel();
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < num_embeddings, "embedding_4bit: index ", index[i],
                    " is outside of 0 ... ", num_embeddings - 1);
  Sizes sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(embedding_dim);
  Tensor out = empty(packed, sizes, type);
  embedding_4bit(w.view, index, count, embedding_dim, dtype, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_int8_op(const Tensor& x_, std::optional<int64_t> dim,
                                                    std::optional<int64_t> block_size, double threshold) {
  const DType dtype = dtype_of(x_, "quantize_int8");
  const Tensor x = dense(x_);
  const int64_t n = x.numel();
  const Sizes sizes(x.sizes().begin(), x.sizes().end());
  Tensor values = empty(x, sizes, ScalarType::Char);
  int8_t* q = values.mutable_data_ptr<int8_t>();
  const bool by_row = dim && (*dim == -1 || *dim == x.dim() - 1) && x.dim() != 0;
  const bool split = by_row && threshold > 0;
  Tensor outliers = torch::stable::new_zeros(x, Sizes{split ? sizes.back() : 0}, ScalarType::Bool);
  if (by_row) {
    Tensor absmax = empty(x, Sizes(sizes.begin(), sizes.end() - 1), ScalarType::Float);
    quantize_int8_rows(dtype, x.const_data_ptr(), rows_of(x), sizes.back(), float(threshold), q,
                       absmax.mutable_data_ptr<float>(),
                       split ? static_cast<uint8_t*>(outliers.mutable_data_ptr()) : nullptr);
    return {values, absmax, outliers};
  }
  if (dim) {
    STD_TORCH_CHECK(*dim == 0 && x.dim() == 2, "quantize_int8: dim must be -1, 0 (for a 2-D x) or None");
    Tensor absmax = empty(x, {sizes[1]}, ScalarType::Float);
    quantize_int8_columns(dtype, x.const_data_ptr(), sizes[0], sizes[1], q, absmax.mutable_data_ptr<float>());
    return {values, absmax, outliers};
  }
  STD_TORCH_CHECK(!block_size || *block_size > 0, "quantize_int8: block_size must be positive");
  Tensor absmax =
      torch::stable::new_zeros(x, block_size ? Sizes{(n + *block_size - 1) / *block_size} : Sizes{}, ScalarType::Float);
  quantize_int8_blocks(dtype, x.const_data_ptr(), n, block_size ? *block_size : std::max<int64_t>(n, 1), q,
                       absmax.mutable_data_ptr<float>());
  return {values, absmax, outliers};
}

Tensor dequantize_int8_op(const Tensor& values_, const Tensor& absmax_, std::optional<int64_t> dim,
                          std::optional<int64_t> block_size, ScalarType type) {
  const DType dtype = dtype_of(type, "dequantize_int8");
  const int64_t n = values_.numel();
  const bool by_row = dim && (*dim == -1 || *dim == values_.dim() - 1) && values_.dim() != 0;
  STD_TORCH_CHECK(!dim || by_row || (*dim == 0 && values_.dim() == 2), "dequantize_int8: dim must be -1, 0 or None");
  STD_TORCH_CHECK(!block_size || *block_size > 0, "dequantize_int8: block_size must be positive");
  const bool by_column = dim && !by_row;
  const int64_t period = std::max<int64_t>(1, dim ? values_.size(values_.dim() - 1) : block_size ? *block_size : n);
  const Tensor values = input(values_, ScalarType::Char, 0, "dequantize_int8", "values");
  const Tensor absmax = input(absmax_, ScalarType::Float, by_column ? (n ? period : 0) : (n + period - 1) / period,
                              "dequantize_int8", "absmax");
  Tensor out = empty_weight(values, Sizes(values.sizes().begin(), values.sizes().end()), type);
  dequantize_int8(values.const_data_ptr<int8_t>(), absmax.const_data_ptr<float>(), by_column, n, period, dtype,
                  out.mutable_data_ptr());
  return out;
}

Tensor linear_int8_of(const char* op, const Tensor& x, const Tensor& values_, const Tensor& absmax_,
                      const OptionalTensor& bias_, double threshold, const Branch& branch) {
  const DType dtype = dtype_of(x, op);
  STD_TORCH_CHECK(values_.dim() == 2, op, ": values must be [out_features, in_features]");
  const int64_t n = values_.size(0), k = values_.size(1);
  Tensor y = empty(x, with_last(x, n), x.scalar_type());
  STD_TORCH_CHECK(x.size(x.dim() - 1) == k, op, ": x has ", x.size(x.dim() - 1), " features, values has ", k);
  STD_TORCH_CHECK(k <= kMaxInt8K, op, ": in_features is ", k, "; int32 sums are exact up to ", kMaxInt8K);
  const Tensor values = input(values_, ScalarType::Char, 0, op, "values");
  const Tensor absmax = input(absmax_, ScalarType::Float, n, op, "absmax");
  const OptionalTensor bias = bias_for(bias_, x, n, op);
  linear_int8({dtype, x.const_data_ptr(), values.const_data_ptr<int8_t>(), absmax.const_data_ptr<float>(),
               data_or_null(bias), float(threshold), rows_of(x), n, k, y.mutable_data_ptr(), branch});
  return y;
}

Tensor linear_int8_op(const Tensor& x, const Tensor& values, const Tensor& absmax, OptionalTensor bias,
                      double threshold) {
  return linear_int8_of("linear_int8", dense(x), values, absmax, bias, threshold, {});
}

std::tuple<Tensor, Tensor> lora_linear_int8_op(const Tensor& x_, const Tensor& values, const Tensor& absmax,
                                               OptionalTensor bias, double threshold, const Tensor& a, const Tensor& b,
                                               double scaling, OptionalTensor seed, double p, bool keep_s) {
  const Tensor x = dense(x_);
  STD_TORCH_CHECK(values.dim() == 2, "lora_linear_int8: values must be [out_features, in_features]");
  const LoraBranch branch(x, values.size(0), a, b, scaling, seed, p, "lora_linear_int8");
  const Tensor y = linear_int8_of("lora_linear_int8", x, values, absmax, bias, threshold, branch.view);
  return {y, branch.kept(x, keep_s)};
}

Tensor linear_int8_dx_op(const Tensor& dy_, const Tensor& values_, const Tensor& absmax_) {
  const DType dtype = dtype_of(dy_, "linear_int8_dx");
  STD_TORCH_CHECK(values_.dim() == 2, "linear_int8_dx: values must be [out_features, in_features]");
  const int64_t n = values_.size(0), k = values_.size(1);
  Tensor dx = empty(dy_, with_last(dy_, k), dy_.scalar_type());
  STD_TORCH_CHECK(dy_.size(dy_.dim() - 1) == n, "linear_int8_dx: dy has ", dy_.size(dy_.dim() - 1),
                  " features, values has ", n, " rows");
  const Tensor values = input(values_, ScalarType::Char, 0, "linear_int8_dx", "values");
  const Tensor absmax = input(absmax_, ScalarType::Float, n, "linear_int8_dx", "absmax");
  const Tensor dy = dense(dy_);
  linear_int8_dx({dtype, dy.const_data_ptr(), values.const_data_ptr<int8_t>(), absmax.const_data_ptr<float>(), nullptr,
                  0.0f, rows_of(dy), n, k, dx.mutable_data_ptr()});
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_int8_backward_op(const Tensor& dy, const Tensor& x, const Tensor& s,
                                                                const Tensor& values_, const Tensor& absmax_,
                                                                const Tensor& a, const Tensor& b, double scaling,
                                                                OptionalTensor seed, double p,
                                                                std::vector<bool> needed) {
  constexpr const char* op = "lora_linear_int8_backward";
  return lora_backward(op, dy, x, s, a, b, scaling, seed, p, needed,
                       [&](const Tensor& dy, const Branch& branch, Tensor& dx) {
                         const int64_t n = b.size(0), k = a.size(1);
                         const Tensor values = input(values_, ScalarType::Char, n * k, op, "values");
                         const Tensor absmax = input(absmax_, ScalarType::Float, n, op, "absmax");
                         linear_int8_dx({dtype_of(dy, op), dy.const_data_ptr(), values.const_data_ptr<int8_t>(),
                                         absmax.const_data_ptr<float>(), nullptr, 0.0f, rows_of(dy), n, k,
                                         dx.mutable_data_ptr(), branch});
                       });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quantlib, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit_op));
  m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit_op));
  m.impl("linear_4bit", TORCH_BOX(&linear_4bit_op));
  m.impl("linear_4bit_dx", TORCH_BOX(&linear_4bit_dx_op));
  m.impl("embedding_4bit", TORCH_BOX(&embedding_4bit_op));
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8_op));
  m.impl("dequantize_int8", TORCH_BOX(&dequantize_int8_op));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_op));
  m.impl("linear_int8_dx", TORCH_BOX(&linear_int8_dx_op));
  m.impl("dropout", TORCH_BOX(&dropout_op));
  m.impl("lora_linear_4bit", TORCH_BOX(&lora_linear_4bit_op));
  m.impl("lora_linear_4bit_backward", TORCH_BOX(&lora_linear_4bit_backward_op));
  m.impl("lora_linear_int8", TORCH_BOX(&lora_linear_int8_op));
  m.impl("lora_linear_int8_backward", TORCH_BOX(&lora_linear_int8_backward_op));
}

// The Python module: which instruction sets this CPU has, best first, and which one is in force.
namespace {

constexpr const char* kIsaNames[] = {"cpu-portable", "cpu-avx2", "cpu-avx512", "cpu-avx512bf16", "cpu-onednn"};

PyObject* cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  const auto append = [&](Isa isa) {
    PyObject* name = names ? PyUnicode_FromString(kIsaNames[int(isa)]) : nullptr;
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  };
  append(best_isa());
  for (int i = int(last_isa()); i >= 0; --i)
    if (Isa(i) != best_isa()) append(Isa(i));
  return names;
}

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(kIsaNames[int(isa())]); }

PyObject* set_cpu_isa(PyObject*, PyObject* name) {
  for (int i = 0; i <= int(last_isa()); ++i)
    if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, kIsaNames[i]) == 0) {
      set_isa(Isa(i));
      Py_RETURN_NONE;
    }
  return PyErr_Format(PyExc_ValueError, "set_cpu_isa: %R is none of cpu_isas()", name);
}

PyMethodDef methods[] = {
    {"cpu_isas", cpu_isas, METH_NOARGS, "Names of the instruction sets this CPU has kernels for, best first."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the instruction set in force."},
    {"set_cpu_isa", set_cpu_isa, METH_O, "Choose one of cpu_isas() for every op of this process."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of quantlib.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace quantlib

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&quantlib::module); }
