// Memory for tensors on the CPU, kept between steps.
//
// libtorch asks malloc for each tensor, and malloc maps large blocks and gives them back: every step faults in the same gigabytes again, a
// fifth of its time. Here freed blocks stay: best fit, neighbours merged, on huge pages.
//
// MEM-1: memory starts at a multiple of 64 bytes, as libtorch's own does; kernels choose their path by it.
// MEM-2: what was allocated before is freed by what allocated it.
#include "shim.h"

#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <set>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

namespace {

constexpr size_t kPage = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
// Address space only: pages that nobody has touched take no memory.
constexpr size_t kSegment = size_t{1} << 30;
// Smaller ones go to malloc, which keeps them anyway.
constexpr size_t kSmallest = size_t{16} << 10;
// With the smallest segments still more than any machine has memory for; what does not fit goes to malloc.
constexpr size_t kSegments = 1024;
// A remainder below this stays with its block.
constexpr size_t kSplit = size_t{4} << 10;

size_t round_up(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

// In front of the memory that it describes.
struct alignas(64) Block {
  size_t bytes;  // with this header
  Block* before; // the neighbour below, null for a segment's first
  bool last;     // the segment's last
  bool free;

  char* start() { return reinterpret_cast<char*>(this); }
  Block* after() { return last ? nullptr : reinterpret_cast<Block*>(start() + bytes); }
  void* memory() { return start() + sizeof(Block); }
  static Block* of(void* memory) { return reinterpret_cast<Block*>(static_cast<char*>(memory) - sizeof(Block)); }
};
static_assert(sizeof(Block) == 64);

struct BySize {
  bool operator()(const Block* left, const Block* right) const {
    return left->bytes != right->bytes ? left->bytes < right->bytes : left < right;
  }
};

class Arena {
 public:
  // `counted`: whether it is somebody's, and not only touched.
  void* take(size_t bytes, bool counted = true) {
    const size_t needed = round_up(bytes, 64) + sizeof(Block);
    const std::lock_guard<std::mutex> guard(lock_);
    Block wanted{needed, nullptr, false, false};
    auto found = free_.lower_bound(&wanted);
    // Ordered by address among equals, so that the search may start below every real block.
    while (found != free_.end() && (*found)->bytes < needed) {
      ++found;
    }
    Block* block = found == free_.end() ? grow(needed) : *found;
    if (block == nullptr) {
      return nullptr;
    }
    if (found != free_.end()) {
      free_.erase(found);
    }
    block->free = false;
    split(block, needed);
    if (counted) {
      in_use_ += block->bytes;
      peak_ = std::max(peak_, in_use_);
    }
    return block->memory();
  }

  // Whether the memory came from here. Without the lock: segments are only added, and the caller's was added before it got its memory.
  bool owns(const void* memory) const {
    const auto* at = static_cast<const char*>(memory);
    const size_t count = segment_count_.load(std::memory_order_acquire);
    return std::any_of(segments_.begin(), segments_.begin() + count,
                       [at](const Segment& segment) { return segment.start <= at && at < segment.start + segment.bytes; });
  }

  void give(void* memory, bool counted = true) {
    const std::lock_guard<std::mutex> guard(lock_);
    Block* block = Block::of(memory);
    if (counted) {
      in_use_ -= block->bytes;
    }
    block->free = true;
    if (Block* after = block->after(); after != nullptr && after->free) {
      free_.erase(after);
      merge(block, after);
    }
    if (Block* before = block->before; before != nullptr && before->free) {
      free_.erase(before);
      merge(before, block);
      block = before;
    }
    free_.insert(block);
  }

  // Has the system give pages for so many bytes more, so that whoever takes them does not wait for it.
  void touch(size_t bytes) {
    void* memory = take(bytes, false);
    if (memory == nullptr) {
      return;
    }
    auto* start = static_cast<volatile char*>(memory);
    for (size_t at = 0; at < bytes; at += kPage) {
      start[at] = 0;
    }
    give(memory, false);
  }

  // Gives the pages of free blocks back to the system.
  void release() {
    const std::lock_guard<std::mutex> guard(lock_);
    for (Block* block : free_) {
      const auto start = round_up(reinterpret_cast<uintptr_t>(block->memory()), kHugePage);
      const auto end = reinterpret_cast<uintptr_t>(block->start() + block->bytes) / kHugePage * kHugePage;
      if (start < end) {
        madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
      }
    }
  }

  void report(int64_t* in_use, int64_t* peak, bool reset) {
    const std::lock_guard<std::mutex> guard(lock_);
    *in_use = static_cast<int64_t>(in_use_);
    *peak = static_cast<int64_t>(peak_);
    if (reset) {
      peak_ = in_use_;
    }
  }

 private:
  static void merge(Block* left, Block* right) {
    left->bytes += right->bytes;
    left->last = right->last;
    if (Block* after = left->after()) {
      after->before = left;
    }
  }

  void split(Block* block, size_t needed) {
    if (block->bytes < needed + kSplit) {
      return;
    }
    auto* rest = new (block->start() + needed) Block{block->bytes - needed, block, block->last, true};
    block->bytes = needed;
    block->last = false;
    if (Block* after = rest->after()) {
      after->before = rest;
    }
    free_.insert(rest);
  }

  Block* grow(size_t needed) {
    const size_t count = segment_count_.load(std::memory_order_relaxed);
    if (count == kSegments) {
      return nullptr;
    }
    // Where so much address space is refused, just what is needed.
    for (const size_t bytes : {std::max(round_up(needed, kHugePage), kSegment), round_up(needed, kHugePage)}) {
      void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped != MAP_FAILED) {
        auto* start = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(mapped), kHugePage));
        madvise(start, bytes, MADV_HUGEPAGE);
        segments_[count] = {start, bytes};
        segment_count_.store(count + 1, std::memory_order_release);
        return new (start) Block{bytes, nullptr, true, false};
      }
    }
    return nullptr;
  }

  struct Segment {
    const char* start;
    size_t bytes;
  };

  std::mutex lock_;
  std::array<Segment, kSegments> segments_{};
  std::atomic<size_t> segment_count_ = 0;
  std::set<Block*, BySize> free_;
  size_t in_use_ = 0;
  size_t peak_ = 0;
};

// Lives as long as the process: tensors may be freed by late destructors.
Arena& arena() {
  static auto* const instance = new Arena();
  return *instance;
}

// One deleter for all, as libtorch wants it.
void give_back(void* memory) {
  if (arena().owns(memory)) {
    arena().give(memory);
  } else {
    std::free(memory);
  }
}

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    if (bytes >= kSmallest) {
      memory = arena().take(bytes);
    }
    if (memory == nullptr && bytes > 0) {
      TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "out of memory: cannot allocate ", bytes, " bytes");
    }
    return {memory, memory, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }
};

}  // namespace

extern "C" {

int32_t thaw_keep_memory() {
  static KeepingAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/1);
  // What does not come from this allocator (scratch space of oneDNN) is kept by malloc. Its limits are ints.
  const bool set = mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1 && mallopt(M_TRIM_THRESHOLD, 2047 << 20) == 1 &&
                   mallopt(M_TOP_PAD, 16 << 20) == 1;
  return set ? 0 : 1;
}

void thaw_release_memory() {
  arena().release();
  malloc_trim(0);
}

void thaw_touch_memory(int64_t bytes) { arena().touch(static_cast<size_t>(bytes)); }

void thaw_memory(int64_t* in_use, int64_t* peak, int32_t reset) { arena().report(in_use, peak, reset != 0); }
}
