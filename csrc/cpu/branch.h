// The end of a LoRA branch, added to the sums of the base product before they are rounded: y += scaling s b^T.
// Included after simd.h.

// Rows [first, first + count) of b times scaling, turned: out[j * stride + i], for j < rank.
template <class T>
static void turn_branch(const Branch& branch, int64_t first, int64_t count, float* out, int64_t stride) {
  const T* b = static_cast<const T*>(branch.b) + first * branch.rank;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < branch.rank; ++j) out[j * stride + i] = widen(b[i * branch.rank + j]) * branch.scaling;
}

SIMD_INLINE void turn_branch(const Branch& branch, int64_t first, int64_t count, float* out, int64_t stride) {
  QUANTLIB_BY_DTYPE(branch.dtype, turn_branch, branch, first, count, out, stride);
}
