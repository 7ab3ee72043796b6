// torch's stable C functions, looked up in the torch that is already loaded.
//
// Nothing of torch is included or linked: the declarations below restate the part of torch's stable C interface that is
// used here (torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h, unchanged since torch 2.10), and
// `bind_shim` finds each function by name. One library therefore serves every torch from 2.10 on.
#pragma once

#include <cstdint>

namespace star {

struct AtenTensorOpaque;
struct TorchLibraryOpaque;
using TensorHandle = AtenTensorOpaque*;
using LibraryHandle = TorchLibraryOpaque*;
using StableValue = uint64_t;  // one argument or result of a boxed operator
using BoxedKernel = void (*)(StableValue* stack, uint64_t num_arguments, uint64_t num_results);
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Name and signature of every function used; each returns 0 on success unless it is a getter.
#define STAR_SHIM_FUNCTIONS(X)                                                                              \
  X(aoti_torch_get_dim, int32_t, (TensorHandle, int64_t*))                                                  \
  X(aoti_torch_get_sizes, int32_t, (TensorHandle, int64_t**))                                               \
  X(aoti_torch_get_strides, int32_t, (TensorHandle, int64_t**))                                             \
  X(aoti_torch_get_dtype, int32_t, (TensorHandle, int32_t*))                                                \
  X(torch_get_const_data_ptr, int32_t, (TensorHandle, const void**))                                        \
  X(aoti_torch_empty_strided, int32_t,                                                                      \
    (int64_t dim, const int64_t*, const int64_t*, int32_t dtype, int32_t device_type, int32_t device_index, \
     TensorHandle*))                                                                                        \
  X(aoti_torch_new_tensor_handle, int32_t, (TensorHandle, TensorHandle*))                                   \
  X(aoti_torch_delete_tensor_object, int32_t, (TensorHandle))                                               \
  X(aoti_torch_library_init_impl, int32_t,                                                                  \
    (const char* ns, const char* key, const char* file, uint32_t line, LibraryHandle*))                     \
  X(torch_library_impl, int32_t, (LibraryHandle, const char* name, BoxedKernel, uint64_t built_for))        \
  X(torch_parallel_for, int32_t, (int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context)) \
  X(torch_get_num_threads, int32_t, (uint32_t*))                                                            \
  X(aoti_torch_device_type_cpu, int32_t, ())                                                                \
  X(aoti_torch_dtype_float32, int32_t, ())                                                                  \
  X(aoti_torch_dtype_bfloat16, int32_t, ())                                                                 \
  X(aoti_torch_dtype_float64, int32_t, ())                                                                  \
  X(aoti_torch_dtype_float16, int32_t, ())                                                                  \
  X(aoti_torch_dtype_int32, int32_t, ())                                                                    \
  X(aoti_torch_dtype_int64, int32_t, ())

struct Shim {
#define STAR_DECLARE(name, result, arguments) result(*name) arguments = nullptr;
  STAR_SHIM_FUNCTIONS(STAR_DECLARE)
#undef STAR_DECLARE
  // Since torch 2.13 an optional argument is freed by torch; before, with `delete`.
  int32_t (*torch_delete_stable_ivalue)(StableValue*) = nullptr;
};

extern Shim shim;

// The version whose calling convention the kernels follow: torch 2.10.
constexpr uint64_t kBuiltForTorch = (uint64_t{2} << 56) | (uint64_t{10} << 48);

// Look every function up in `torch_library` (a dlopen handle); the name of the first one missing, or nullptr.
const char* bind_shim(void* torch_library);

}  // namespace star
