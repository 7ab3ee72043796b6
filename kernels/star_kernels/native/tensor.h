// Tensors as the operators see them: pointer, sizes and strides of any layout, read once.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "error.h"
#include "shim.h"
#include "vec_common.h"

namespace star {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat64, kFloat16, kInt32, kInt64, kOther };

template <class T> constexpr DType dtype_of() {
  using Element = std::remove_const_t<T>;
  if constexpr (std::is_same_v<Element, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<Element, bf16>) return DType::kBFloat16;
  if constexpr (std::is_same_v<Element, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<Element, int32_t>) return DType::kInt32;
  if constexpr (std::is_same_v<Element, int64_t>) return DType::kInt64;
}

// An owned reference to a tensor. Sizes and strides count elements and belong to the tensor.
class Tensor {
 public:
  Tensor() = default;                    // no tensor: an optional argument that was not given
  explicit Tensor(TensorHandle handle);  // takes the reference over
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    swap(other);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr && owner_ != Owner::kCaller) shim.aoti_torch_delete_tensor_object(handle_);
  }

  bool defined() const { return handle_ != nullptr; }
  explicit operator bool() const { return defined(); }

  int64_t dim() const { return dim_; }
  // Negative axes count from the end.
  int64_t size(int64_t axis) const { return sizes_[axis < 0 ? axis + dim_ : axis]; }
  int64_t stride(int64_t axis) const { return strides_[axis < 0 ? axis + dim_ : axis]; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int64_t numel() const;
  bool is_contiguous() const;
  bool same_shape(const Tensor& other) const;
  bool has_shape(std::initializer_list<int64_t> sizes) const;
  DType dtype() const { return dtype_; }

  // Bytes of one element.
  int64_t element_size() const;

  // The first element. `data` is for reading; `mutable_data` for tensors this operator has made.
  template <class T> const T* data() const {
    require(dtype_ == dtype_of<T>(), "star_kernels: a tensor has another dtype than its kernel expects");
    return static_cast<const T*>(data_);
  }
  template <class T> T* mutable_data() { return const_cast<T*>(data<T>()); }
  const void* raw() const { return data_; }
  void* mutable_raw() { return const_cast<void*>(data_); }

  // The same tensor once more. An operator's argument outlives the operator's body, so it is borrowed; a tensor that the
  // operator made is counted (0.15 us).
  Tensor alias() const;
  TensorHandle release();  // hands the reference to the caller
  void become_argument() { owner_ = Owner::kArgument; }

 private:
  enum class Owner : int8_t { kThis, kArgument, kCaller };
  void swap(Tensor& other) noexcept;
  TensorHandle new_reference() const;

  TensorHandle handle_ = nullptr;
  const void* data_ = nullptr;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
  int64_t dim_ = 0;
  DType dtype_ = DType::kOther;
  Owner owner_ = Owner::kThis;  // kCaller: borrowed from a tensor that outlives this one
};

// A tensor argument that may be None (`Tensor?` in the schema).
class OptionalTensor : public Tensor {
 public:
  using Tensor::Tensor;
};

// New contiguous tensors on the CPU. Under test their memory is filled with NaN first (`set_nan_fill` in the Python
// loader), so that an element no kernel wrote shows.
Tensor empty(int64_t dim, const int64_t* sizes, DType dtype);
inline Tensor empty(std::initializer_list<int64_t> sizes, DType dtype) {
  return empty(static_cast<int64_t>(sizes.size()), sizes.begin(), dtype);
}
inline Tensor empty_like(const Tensor& other) { return empty(other.dim(), other.sizes(), other.dtype()); }
Tensor zeros(std::initializer_list<int64_t> sizes, DType dtype);
void set_nan_fill(bool on);
bool nan_fill_is_on();

// The tensor itself if its layout fits, else a copy: every axis contiguous, or the last alone (stride 1).
Tensor contiguous(const Tensor& tensor);
Tensor last_contiguous(const Tensor& tensor);

// A contiguous tensor of the given dtype: the tensor itself if it is one. For parameters and gradients of parameters,
// whose dtype may differ from the activations'; float16 included. Integers become kInt64 alone (boundaries, targets): a
// parameter of integers is a mistake. `widen_integers` makes positions of any dtype float64.
Tensor cast(const Tensor& tensor, DType dtype);
Tensor widen_integers(const Tensor& tensor);

// Call `function` with a value of the element type (float, bf16 or double).
template <class F> inline void dispatch_dtype(DType dtype, F&& function) {
  switch (dtype) {
    case DType::kFloat32: return function(float{});
    case DType::kBFloat16: return function(bf16{});
    case DType::kFloat64: return function(double{});
    default: throw_value_error("star_kernels: dtype must be float32, bfloat16 or float64");
  }
}

}  // namespace star
