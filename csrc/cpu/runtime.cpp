// The instruction set in force, and reusable buffers.
#include <atomic>
#include <cstdlib>
#include <new>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu.h"

namespace quantlib {

Isa last_isa() {
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
  unsigned eax, ebx, ecx, edx;  // older clang does not know "f16c"
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
  const bool has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
    return has_onednn() ? Isa::onednn : Isa::avx512bf16;
  if (has_avx512) return Isa::avx512;
  if (has_avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

// Without the system's leave to use AMX oneDNN does without, and so correctly.
static bool has_amx() {
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAll) == kAll;
#else
  return false;
#endif
}

Isa best_isa() {
  const Isa last = last_isa();
  return last == Isa::onednn && !has_amx() ? Isa::avx512bf16 : last;
}

static constexpr int64_t kHuge = int64_t(2) << 20;  // bytes of a huge page

void expect_writes(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

namespace {

std::atomic<Isa> current{best_isa()};

struct Buffer {
  static constexpr int64_t kKeep = int64_t(32) << 20;
  void* data = nullptr;
  int64_t bytes = 0;

  ~Buffer() { clear(); }
  void clear() {
    std::free(data);
    data = nullptr;
    bytes = 0;
  }
  void* reserve(int64_t wanted) {
    if (wanted > bytes) {
      clear();
      const int64_t rounded = (wanted + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, static_cast<size_t>(rounded));
      if (!data) throw std::bad_alloc();
      bytes = rounded;
      expect_writes(data, bytes);
    }
    return data;
  }
};
thread_local Buffer buffers[10];

std::atomic<Block*> kept_block{nullptr};

void free_block(Block* block) {
  if (block) std::free(block->data);
  delete block;
}

// Whether the system may take the block's pages now, without which it is not kept.
bool lend_pages(const Block& block) {
#ifdef MADV_FREE
  return madvise(block.data, static_cast<size_t>(block.bytes), MADV_FREE) == 0;
#else
  return false;
#endif
}

}  // namespace

Block* acquire_block(int64_t bytes, bool brief) {
  Block* const kept = kept_block.exchange(nullptr);
  if (kept && kept->bytes >= bytes && (brief || kept->bytes / 2 <= bytes)) return kept;
  free_block(kept);
  const int64_t rounded = (bytes + kHuge - 1) / kHuge * kHuge;
  void* const data = std::aligned_alloc(kHuge, static_cast<size_t>(rounded));
  if (!data) throw std::bad_alloc();
  expect_writes(data, rounded);
  return new Block{data, rounded};
}

void release_block(Block* block) {
  constexpr int64_t kMost = int64_t(256) << 20;
  free_block(block->bytes <= kMost && lend_pages(*block) ? kept_block.exchange(block) : block);
}

Isa isa() { return current.load(std::memory_order_relaxed); }
void set_isa(Isa isa) { current.store(isa, std::memory_order_relaxed); }

void* acquire_scratch(int slot, int64_t bytes) { return buffers[slot].reserve(bytes); }
void release_scratch(int slot) {
  if (buffers[slot].bytes > Buffer::kKeep) buffers[slot].clear();
}

}  // namespace quantlib
