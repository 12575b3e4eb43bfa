// Makes the CUDA kernels known to PyTorch, as torch.ops.quantlib_cuda.*: the only file of this module that knows
// torch. They have a namespace of their own so that loading the module changes nothing: which op they serve, and
// whether unasked, is for quantlib/backends.py to say.

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace quantlib {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "quantlib.", op, ": the kernel did not start: ", cudaGetErrorString(error));
}

Float float_of(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Float::kFloat32;
    case ScalarType::Half: return Float::kFloat16;
    case ScalarType::BFloat16: return Float::kBFloat16;
    default: STD_TORCH_CHECK(false, "quantlib.", op, ": dtype must be float32, float16 or bfloat16");
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

Tensor dequantize_4bit_op(Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                          std::optional<Tensor> nested_codebook, std::optional<Tensor> offset, std::string quant_type,
                          int64_t block_size, std::vector<int64_t> shape, ScalarType dtype) {
  const Float target = float_of("dequantize_4bit", dtype);
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  packed = torch::stable::contiguous(packed);
  absmax = torch::stable::contiguous(absmax);
  Tensor out = torch::stable::new_empty(packed, shape, dtype);
  if (out.numel() == 0) return out;

  Weight4bit weight{};
  weight.packed = data<uint8_t>(packed);
  weight.fp4 = quant_type == "fp4";
  weight.block_shift = __builtin_ctzll(static_cast<uint64_t>(block_size));
  weight.n = out.numel();
  if (nested_absmax.has_value()) {
    nested_absmax = torch::stable::contiguous(*nested_absmax);
    nested_codebook = torch::stable::contiguous(*nested_codebook);
    weight.absmax = {nullptr, data<uint8_t>(absmax), data<float>(*nested_absmax), data<float>(*nested_codebook),
                     data<float>(*offset)};
  } else {
    weight.absmax.values = data<float>(absmax);
  }
  check_launch("dequantize_4bit", dequantize_4bit(weight, target, out.mutable_data_ptr(), current_stream(packed)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(quantlib_cuda, m) {
  m.def(
      "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_codebook, "
      "Tensor? offset, str quant_type, int block_size, SymInt[] shape, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quantlib_cuda, CUDA, m) { m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit_op)); }

}  // namespace quantlib

// `import quantlib._C_cuda` loads the library, which registers the ops; there is nothing else in it.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
