// The end of a LoRA branch, added to the sums of the base product before they are rounded: y += scaling s b^T.
// Included after simd.h and transpose.h.
//
// W + scaling b a is not decoded instead, as on GPUs: the branch leaves nothing to win. With rank 16 on 4096 x 4096 a
// product of 8192 rows took 686.0 ms, without the branch 685.6.

SIMD_INLINE int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

// Rows [first, first + count) of b times scaling, turned: out[j * stride + i] for j < rank, with what fills `stride`,
// whole vectors, and whole_vectors(rank) rows.
template <class T>
static void turn_branch(const Branch& branch, int64_t first, int64_t count, float* out, int64_t stride) {
  const T* b = static_cast<const T*>(branch.b) + first * branch.row;
  const F32 scaling = set1(branch.scaling);
  const auto scaled = [&](const T* p, int64_t n)
                          __attribute__((always_inline)) { return (n >= W ? load(p) : load_part(p, n)) * scaling; };
  if (branch.row == 1) {
    for (int64_t j = 0; j < branch.rank; ++j)
      for (int64_t i = 0; i < stride; i += W)
        store(out + j * stride + i, i < count ? scaled(b + j * branch.column + i, count - i) : F32{});
    return;
  }
  for (int64_t i0 = 0; i0 < stride; i0 += W)
    for (int64_t j = 0; j < branch.rank; j += W) {
      alignas(64) float rows[W * W];
      for (int64_t i = 0; i < W; ++i)
        store(rows + i * W, i0 + i < count ? scaled(b + (i0 + i) * branch.row + j, branch.rank - j) : F32{});
      transpose(reinterpret_cast<const uint32_t*>(rows), W, W - 1, W,
                reinterpret_cast<uint32_t*>(out + j * stride + i0), stride);
    }
}

SIMD_INLINE void turn_branch(const Branch& branch, int64_t first, int64_t count, float* out, int64_t stride) {
  QUANTLIB_BY_DTYPE(branch.dtype, turn_branch, branch, first, count, out, stride);
}

// sums[r * stride + c] += sum of a[r * row + j * column] b[j * width + c] over j < depth, for `rows` rows of `width`
// columns, whole vectors.
template <int R>
SIMD_INLINE void add_rows(const float* a, int64_t row, int64_t column, const float* b, int64_t depth, int64_t width,
                          float* sums, int64_t stride) {
  constexpr int64_t kChain = 32;  // with one chain, from the sums on, a rank of 256 had 2.6 times PyTorch's error
  for (int64_t c = 0; c < width; c += W) {
    F32 sum[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = load(sums + r * stride + c);
    for (int64_t j = 0; j < depth;) {
      const int64_t end = j + kChain < depth ? j + kChain : depth;
      F32 part[R] = {};
      for (; j < end; ++j) {
        const F32 v = load(b + j * width + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) part[r] = fma(set1(a[r * row + j * column]), v, part[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] += part[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(sums + r * stride + c, sum[r]);
  }
}
static void add_product(int64_t rows, const float* a, int64_t row, int64_t column, const float* b, int64_t depth,
                        int64_t width, float* sums, int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_rows<4>(a + r * row, row, column, b, depth, width, sums + r * stride, stride);
  for (; r < rows; ++r) add_rows<1>(a + r * row, row, column, b, depth, width, sums + r * stride, stride);
}

// Adds the branch to `count` columns from c0 on of rows of sums, `stride` floats each and whole vectors.
static void add_branch(const Branch& branch, float* sums, int64_t stride, int64_t m0, int64_t rows, int64_t c0,
                       int64_t count) {
  const int64_t width = whole_vectors(count), rank = branch.rank;
  const Scratch<float> b(7, whole_vectors(rank) * width);
  turn_branch(branch, c0, count, b, width);
  add_product(rows, branch.s + m0 * rank, rank, 1, b, rank, width, sums, stride);
}
