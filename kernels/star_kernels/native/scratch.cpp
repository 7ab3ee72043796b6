#include "scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "tensor.h"

#if defined(__SANITIZE_ADDRESS__)
#define STAR_CHECKED_SCRATCH
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define STAR_CHECKED_SCRATCH
#endif
#endif

namespace star {
namespace {

constexpr size_t kAlign = 64;

#ifdef STAR_CHECKED_SCRATCH

// Every piece is an allocation of its own size, so that AddressSanitizer sees what goes past its end.
struct Arena {
  std::vector<void*> blocks;
  size_t block = 0;  // pieces in use
  size_t used = 0;
  int scopes = 0;

  void* take(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlign, bytes) != 0) throw std::bad_alloc();
    blocks.push_back(memory);
    ++block;
    return memory;
  }

  void release(size_t to_block, size_t) {
    for (; block > to_block; --block) {
      std::free(blocks.back());
      blocks.pop_back();
    }
  }

  void trim() {}
};

#else

constexpr size_t kFirstBlock = size_t{1} << 18;
// What an idle thread keeps at most; larger temporary memory is freed when the last scope ends.
constexpr size_t kKeep = size_t{1} << 25;

struct Block {
  char* memory;
  size_t size;
};

struct Arena {
  std::vector<Block> blocks;
  size_t block = 0;  // the one in use
  size_t used = 0;   // bytes of it
  int scopes = 0;

  ~Arena() {
    for (const Block& one : blocks) std::free(one.memory);
  }

  void add(size_t size) {
    auto* memory = static_cast<char*>(std::aligned_alloc(kAlign, size));
    if (memory == nullptr) throw std::bad_alloc();
    blocks.push_back({memory, size});
  }

  void* take(size_t bytes) {
    bytes = (bytes + kAlign - 1) / kAlign * kAlign;
    while (block < blocks.size() && used + bytes > blocks[block].size) {
      ++block;
      used = 0;
    }
    if (block == blocks.size()) {
      const size_t least = blocks.empty() ? kFirstBlock : 2 * blocks.back().size;
      add(bytes > least ? bytes : least);
    }
    void* result = blocks[block].memory + used;
    used += bytes;
    return result;
  }

  void release(size_t to_block, size_t to_used) {
    block = to_block;
    used = to_used;
  }

  // Nothing is in use: keep the largest block alone, unless it is too large to keep.
  void trim() {
    if (blocks.empty()) return;
    while (blocks.size() > 1) {
      const size_t smaller = blocks.front().size <= blocks.back().size ? 0 : blocks.size() - 1;
      std::free(blocks[smaller].memory);
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(smaller));
    }
    if (blocks.front().size > kKeep) {
      std::free(blocks.front().memory);
      blocks.clear();
    }
  }
};

#endif  // STAR_CHECKED_SCRATCH

Arena& arena() {
  thread_local Arena instance;
  return instance;
}

}  // namespace

Scratch::Scratch() : block_(arena().block), used_(arena().used) { ++arena().scopes; }

Scratch::~Scratch() {
  Arena& own = arena();
  own.release(block_, used_);
  if (--own.scopes == 0) own.trim();
}

void* Scratch::take(size_t bytes) {
  void* memory = arena().take(bytes);
  if (__builtin_expect(nan_fill_is_on(), 0)) std::memset(memory, 0xFF, bytes);
  return memory;
}

}  // namespace star
