// The end of a LoRA branch, added to the sums of the base product before they are rounded: y += scaling s b^T.
// Included after simd.h.
//
// W + scaling b a is not decoded instead, as on GPUs: the branch leaves nothing to win. With rank 16 on 4096 x 4096 a
// product of 8192 rows took 686.0 ms, without the branch 685.6.

// Rows [first, first + count) of b times scaling, turned: out[j * stride + i], for j < rank.
template <class T>
static void turn_branch(const Branch& branch, int64_t first, int64_t count, float* out, int64_t stride) {
  const T* b = static_cast<const T*>(branch.b) + first * branch.row;
  for (int64_t j = 0; j < branch.rank; ++j)
    for (int64_t i = 0; i < count; ++i)
      out[j * stride + i] = widen(b[i * branch.row + j * branch.column]) * branch.scaling;
}

SIMD_INLINE void turn_branch(const Branch& branch, int64_t first, int64_t count, float* out, int64_t stride) {
  QUANTLIB_BY_DTYPE(branch.dtype, turn_branch, branch, first, count, out, stride);
}

// R rows of sums += s times b, turned, of `width` columns.
template <int R>
SIMD_INLINE void add_products(const float* s, const float* b, int64_t rank, int64_t width, float* sums,
                              int64_t stride) {
  for (int64_t c = 0; c < width; c += W) {
    F32 sum[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = load(sums + r * stride + c);
    for (int64_t j = 0; j < rank; ++j) {
      const F32 v = load(b + j * width + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] = fma(set1(s[r * rank + j]), v, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(sums + r * stride + c, sum[r]);
  }
}

// Adds the branch to `count` columns from c0 on of rows of sums, `stride` floats each and whole vectors.
static void add_branch(const Branch& branch, float* sums, int64_t stride, int64_t m0, int64_t rows, int64_t c0,
                       int64_t count) {
  const int64_t width = (count + W - 1) / W * W, rank = branch.rank;
  const Scratch<float> b(7, rank * width);
  __builtin_memset(b, 0, sizeof(float) * rank * width);
  turn_branch(branch, c0, count, b, width);
  const float* const s = branch.s + m0 * rank;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_products<4>(s + r * rank, b, rank, width, sums + r * stride, stride);
  for (; r < rows; ++r) add_products<1>(s + r * rank, b, rank, width, sums + r * stride, stride);
}
