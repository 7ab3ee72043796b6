// What the Python loader calls: bind to the torch that is loaded, list the operators, register their kernels.
#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "operator.h"

namespace star {

Shim shim;
Operator* Operator::first = nullptr;

const char* bind_shim(void* torch_library) {
#define STAR_BIND(name, result, arguments)                                        \
  shim.name = reinterpret_cast<result(*) arguments>(dlsym(torch_library, #name)); \
  if (shim.name == nullptr) return #name;
  STAR_SHIM_FUNCTIONS(STAR_BIND)
#undef STAR_BIND
  shim.torch_delete_stable_ivalue =
      reinterpret_cast<int32_t (*)(StableValue*)>(dlsym(torch_library, "torch_delete_stable_ivalue"));
  return nullptr;
}

void throw_value_error(const char* message) { throw std::invalid_argument(message); }

void throw_torch_error(const char* function) {
  throw std::runtime_error(std::string("star_kernels: torch failed in ") + function + " (out of memory?)");
}

}  // namespace star

// The instruction set this library was compiled for.
STAR_EXPORT const char* star_isa() { return STAR_ISA_NAME; }

// The names of the operator folders that it was built from, separated by spaces.
STAR_EXPORT const char* star_parts() { return STAR_PARTS; }

// The schema of operator `index`, or null past the last.
STAR_EXPORT const char* star_schema(int64_t index) {
  star::Operator* op = star::Operator::first;
  for (; op != nullptr && index > 0; --index) op = op->next;
  return op == nullptr ? nullptr : op->schema;
}

// Fill new tensors with NaN from now on, so that an element no kernel wrote shows; for tests.
STAR_EXPORT void star_set_nan_fill(bool on) { star::set_nan_fill(on); }

// Find torch's functions in `torch_library`, a dlopen handle. Returns null, or the name of a function this torch lacks.
STAR_EXPORT const char* star_bind(void* torch_library) { return star::bind_shim(torch_library); }

// Register every kernel for CPU tensors, under its schema's name and as the overload `raw`. Returns null, or the name
// that torch refused.
STAR_EXPORT const char* star_register() {
  star::LibraryHandle library;
  if (star::shim.aoti_torch_library_init_impl("star_kernels", "CPU", __FILE__, __LINE__, &library) != 0)
    return "library";
  for (star::Operator* op = star::Operator::first; op != nullptr; op = op->next) {
    const std::string name(op->schema, std::strchr(op->schema, '('));
    for (const std::string& overload : {name, name + ".raw"}) {
      if (star::shim.torch_library_impl(library, overload.c_str(), op->kernel, star::kBuiltForTorch) != 0)
        return op->schema;
    }
  }
  return nullptr;  // the library handle is kept: deleting it would take the kernels back
}
