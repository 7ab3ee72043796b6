// From a C++ function to an operator of torch: STAR_OPERATOR("name(Tensor x, ...) -> Tensor", function).
//
// The function's parameters mirror the schema's:
//
//   schema             parameter                schema result        C++ result
//   Tensor             const Tensor&            Tensor               Tensor
//   Tensor?            const OptionalTensor&    (Tensor, Tensor)     std::tuple<Tensor, Tensor>
//   int, SymInt        int64_t
//   float              double
//   bool               bool
//
// Other optional numbers have no form here: pass a number that stands for "none" (window = -1) from Python.
#pragma once

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tensor.h"

namespace star {

template <class T> struct Unbox {
  static T from(StableValue value) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 8 || sizeof(T) == 1),
                  "use int64_t, double, bool or a tensor");
    T result;
    std::memcpy(&result, &value, sizeof(T));  // little endian: the low bytes hold the value
    return result;
  }
};
template <> struct Unbox<Tensor> {
  static Tensor from(StableValue value) {
    Tensor argument(reinterpret_cast<TensorHandle>(value));
    argument.become_argument();
    return argument;
  }
};
template <> struct Unbox<OptionalTensor> {
  static OptionalTensor from(StableValue value) {
    if (value == 0) return OptionalTensor();
    auto* boxed = reinterpret_cast<StableValue*>(value);
    auto* handle = reinterpret_cast<TensorHandle>(*boxed);
    if (shim.torch_delete_stable_ivalue != nullptr) {
      shim.torch_delete_stable_ivalue(boxed);
    } else {
      delete boxed;
    }
    OptionalTensor argument(handle);
    argument.become_argument();
    return argument;
  }
};

inline void box_results(StableValue* stack, Tensor&& result) {
  stack[0] = reinterpret_cast<StableValue>(result.release());
}
template <class... T> inline void box_results(StableValue* stack, std::tuple<T...>&& results) {
  std::apply([&](auto&... each) { ((*stack++ = reinterpret_cast<StableValue>(each.release())), ...); }, results);
}

template <auto function> struct Boxed;
template <class R, class... A, R (*function)(A...)> struct Boxed<function> {
  static void call(StableValue* stack, uint64_t num_arguments, uint64_t) {
    require(num_arguments == sizeof...(A), "star_kernels: schema and kernel disagree on the number of arguments");
    unpack(stack, std::index_sequence_for<A...>());
  }
  template <size_t... i> static void unpack(StableValue* stack, std::index_sequence<i...>) {
    std::tuple<std::decay_t<A>...> arguments{Unbox<std::decay_t<A>>::from(stack[i])...};
    box_results(stack, std::apply(function, arguments));
  }
};

// A link of the chain of all operators of this library, made before `main`.
struct Operator {
  Operator(const char* schema_text, BoxedKernel boxed_kernel) : schema(schema_text), kernel(boxed_kernel), next(first) {
    first = this;
  }
  const char* schema;
  BoxedKernel kernel;
  Operator* next;
  static Operator* first;
};

}  // namespace star

// A plain C function that the Python side calls through ctypes.
#define STAR_EXPORT extern "C" __attribute__((visibility("default")))

#define STAR_JOIN_(a, b) a##b
#define STAR_JOIN(a, b) STAR_JOIN_(a, b)
#define STAR_OPERATOR(schema, function) \
  static ::star::Operator STAR_JOIN(star_operator_, __COUNTER__)(schema, &::star::Boxed<&function>::call)
