#include "scratch.h"

#include <cstdlib>
#include <new>
#include <vector>

namespace star {
namespace {

constexpr size_t kAlign = 64;
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

Arena& arena() {
  thread_local Arena instance;
  return instance;
}

}  // namespace

Scratch::Scratch() : block_(arena().block), used_(arena().used) { ++arena().scopes; }

Scratch::~Scratch() {
  Arena& own = arena();
  own.block = block_;
  own.used = used_;
  if (--own.scopes == 0) own.trim();
}

void* Scratch::take(size_t bytes) { return arena().take(bytes); }

}  // namespace star
