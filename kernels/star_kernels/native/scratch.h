// Temporary memory from the thread's own arena: no allocation after the first calls, 64-byte aligned, given back in one
// step.
//
//   Scratch scratch;
//   float* tile = scratch.get<float>(64 * 64);   // uninitialised; valid until `scratch` goes out of scope
#pragma once

#include <cstddef>
#include <cstdint>

namespace star {

class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T> T* get(int64_t count) { return static_cast<T*>(take(static_cast<size_t>(count) * sizeof(T))); }

 private:
  void* take(size_t bytes);

  size_t block_;  // the arena's position when this scope began
  size_t used_;
};

}  // namespace star
