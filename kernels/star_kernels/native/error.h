// Errors that reach Python: a boxed operator lets them through torch's dispatcher, never ends the process.
#pragma once

#include <cstdint>

namespace star {

// Becomes Python's ValueError: an argument that no caller may pass. The Python side validates first, so that this is
// the second line of defence, for callers of torch.ops.
[[noreturn]] void throw_value_error(const char* message);

// Becomes Python's RuntimeError: torch refused (out of memory, for one).
[[noreturn]] void throw_torch_error(const char* function);

inline void require(bool condition, const char* message) {
  if (__builtin_expect(!condition, 0)) throw_value_error(message);
}

inline void check_torch(int32_t status, const char* function) {
  if (__builtin_expect(status != 0, 0)) throw_torch_error(function);
}

}  // namespace star
