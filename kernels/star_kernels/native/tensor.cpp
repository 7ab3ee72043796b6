#include "tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cmath>
#include <cstring>
#include <utility>

#include "parallel.h"
#include "rows.h"
#include "vec.h"

namespace star {
namespace {

constexpr int64_t kMostAxes = Rows::kMostAxes;
constexpr int kNumDTypes = static_cast<int>(DType::kOther);
constexpr int64_t kElementSizes[kNumDTypes + 1] = {4, 2, 8, 2, 4, 8, 1};

bool nan_fill = false;

// torch's number of each dtype, in the order of DType.
const int32_t* dtype_codes() {
  static const int32_t codes[kNumDTypes] = {shim.aoti_torch_dtype_float32(), shim.aoti_torch_dtype_bfloat16(),
                                            shim.aoti_torch_dtype_float64(), shim.aoti_torch_dtype_float16(),
                                            shim.aoti_torch_dtype_int32(),   shim.aoti_torch_dtype_int64()};
  return codes;
}

double half_to_double(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const double fraction = bits & 1023;
  double value;
  if (exponent == 31) {
    value = fraction != 0 ? __builtin_nan("") : __builtin_inf();
  } else {
    value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

uint16_t double_to_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (size != size) return sign | 0x7E00;
  if (size >= 65520.0) return sign | 0x7C00;
  // In units of the last place: 2^-24 below the normal range, 2^(e - 10) in it. nearbyint rounds to even.
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

double read_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kBFloat16: return to_float(static_cast<const bf16*>(data)[i]);
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat16: return half_to_double(static_cast<const uint16_t*>(data)[i]);
    case DType::kInt32: return static_cast<const int32_t*>(data)[i];
    case DType::kInt64: return static_cast<double>(static_cast<const int64_t*>(data)[i]);
    default: throw_value_error("star_kernels: a tensor has an unsupported dtype");
  }
}

void write_element(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[i] = static_cast<float>(value); return;
    case DType::kBFloat16: static_cast<bf16*>(data)[i] = to_bf16(static_cast<float>(value)); return;
    case DType::kFloat64: static_cast<double*>(data)[i] = value; return;
    case DType::kFloat16: static_cast<uint16_t*>(data)[i] = double_to_half(value); return;
    case DType::kInt32: static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value); return;
    case DType::kInt64: static_cast<int64_t*>(data)[i] = static_cast<int64_t>(value); return;
    default: throw_value_error("star_kernels: a tensor has an unsupported dtype");
  }
}

// Ask for 2 MB pages in a large new tensor. The C library takes blocks over 32 MB afresh from the system each time, and
// faulting them in by 4 KB pages is slower than any kernel: writing 128 MB ran at 3.7 GB/s, with this at 12.
void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * kPage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  // A refusal (no such pages on this system) changes nothing.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void fill_bytes(Tensor& tensor, int byte) {
  const int64_t count = tensor.numel() * tensor.element_size();
  if (count > 0) std::memset(tensor.mutable_raw(), byte, static_cast<size_t>(count));
}

template <class From, class To> void convert(const Tensor& from, Tensor& to) {
  const From* in = from.data<From>();
  To* out = to.mutable_data<To>();
  parallel_for(from.numel(), kGrainElements, [&](int64_t begin, int64_t end) {
    sweep<VecF>(end - begin,
                [&](int64_t i, auto lanes) { VecF::load(in + begin + i, lanes).store(out + begin + i, lanes); });
  });
}

template <class Word> void copy_rows(const Tensor& from, void* to) {
  const Rows rows(from);
  const int64_t width = from.size(-1), stride = from.stride(-1);
  const auto* in = static_cast<const Word*>(from.raw());
  auto* out = static_cast<Word*>(to);
  parallel_for(rows.count(), grain_rows(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Word* row = in + rows.offset(r);
      if (stride == 1 && width > 0) {
        std::memcpy(out + r * width, row, static_cast<size_t>(width) * sizeof(Word));
      } else {
        for (int64_t i = 0; i < width; ++i) out[r * width + i] = row[i * stride];
      }
    }
  });
}

}  // namespace

Tensor::Tensor(TensorHandle handle) : handle_(handle) {
  int64_t* pointer;
  int32_t code;
  check_torch(shim.aoti_torch_get_dim(handle, &dim_), "aoti_torch_get_dim");
  check_torch(shim.aoti_torch_get_sizes(handle, &pointer), "aoti_torch_get_sizes");
  sizes_ = pointer;
  check_torch(shim.aoti_torch_get_strides(handle, &pointer), "aoti_torch_get_strides");
  strides_ = pointer;
  check_torch(shim.torch_get_const_data_ptr(handle, &data_), "torch_get_const_data_ptr");
  check_torch(shim.aoti_torch_get_dtype(handle, &code), "aoti_torch_get_dtype");
  for (int i = 0; i < kNumDTypes; ++i) {
    if (dtype_codes()[i] == code) dtype_ = static_cast<DType>(i);
  }
}

void Tensor::swap(Tensor& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(data_, other.data_);
  std::swap(sizes_, other.sizes_);
  std::swap(strides_, other.strides_);
  std::swap(dim_, other.dim_);
  std::swap(dtype_, other.dtype_);
  std::swap(owner_, other.owner_);
}

TensorHandle Tensor::new_reference() const {
  TensorHandle copy;
  check_torch(shim.aoti_torch_new_tensor_handle(handle_, &copy), "aoti_torch_new_tensor_handle");
  return copy;
}

Tensor Tensor::alias() const {
  if (owner_ == Owner::kThis) return Tensor(new_reference());
  Tensor borrowed;
  borrowed.handle_ = handle_;
  borrowed.data_ = data_;
  borrowed.sizes_ = sizes_;
  borrowed.strides_ = strides_;
  borrowed.dim_ = dim_;
  borrowed.dtype_ = dtype_;
  borrowed.owner_ = Owner::kCaller;
  return borrowed;
}

TensorHandle Tensor::release() {
  TensorHandle handle = owner_ == Owner::kCaller ? new_reference() : handle_;
  handle_ = nullptr;
  return handle;
}

int64_t Tensor::element_size() const { return kElementSizes[static_cast<int>(dtype_)]; }

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < dim_; ++i) count *= sizes_[i];
  return count;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t i = dim_ - 1; i >= 0; --i) {
    if (sizes_[i] == 0) return true;
    if (sizes_[i] != 1 && strides_[i] != expected) return false;
    expected *= sizes_[i];
  }
  return true;
}

bool Tensor::same_shape(const Tensor& other) const {
  if (dim_ != other.dim_) return false;
  for (int64_t i = 0; i < dim_; ++i) {
    if (sizes_[i] != other.sizes_[i]) return false;
  }
  return true;
}

bool Tensor::has_shape(std::initializer_list<int64_t> sizes) const {
  if (dim_ != static_cast<int64_t>(sizes.size())) return false;
  for (int64_t i = 0; i < dim_; ++i) {
    if (sizes_[i] != sizes.begin()[i]) return false;
  }
  return true;
}

void set_nan_fill(bool on) { nan_fill = on; }
bool nan_fill_is_on() { return nan_fill; }

Tensor empty(int64_t dim, const int64_t* sizes, DType dtype) {
  require(dim <= kMostAxes, "star_kernels: a tensor has more than 16 axes");
  require(dtype != DType::kOther, "star_kernels: a tensor has an unsupported dtype");
  int64_t strides[kMostAxes];
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  static const int32_t cpu = shim.aoti_torch_device_type_cpu();
  TensorHandle handle;
  check_torch(
      shim.aoti_torch_empty_strided(dim, sizes, strides, dtype_codes()[static_cast<int>(dtype)], cpu, 0, &handle),
      "aoti_torch_empty_strided");
  Tensor result(handle);
  advise_huge_pages(result.mutable_raw(), step * result.element_size());
  if (__builtin_expect(nan_fill, 0)) fill_bytes(result, 0xFF);  // all bits set are a NaN in every floating dtype
  return result;
}

Tensor zeros(std::initializer_list<int64_t> sizes, DType dtype) {
  Tensor result = empty(sizes, dtype);
  fill_bytes(result, 0);
  return result;
}

Tensor contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor.alias();
  Tensor result = empty_like(tensor);
  switch (tensor.element_size()) {
    case 2: copy_rows<uint16_t>(tensor, result.mutable_raw()); break;
    case 4: copy_rows<uint32_t>(tensor, result.mutable_raw()); break;
    default: copy_rows<uint64_t>(tensor, result.mutable_raw());
  }
  return result;
}

Tensor last_contiguous(const Tensor& tensor) {
  if (tensor.dim() == 0 || tensor.size(-1) <= 1 || tensor.stride(-1) == 1) return tensor.alias();
  return contiguous(tensor);
}

namespace {

Tensor converted(const Tensor& tensor, DType dtype) {
  Tensor from = contiguous(tensor);
  if (from.dtype() == dtype) return from;
  Tensor to = empty(from.dim(), from.sizes(), dtype);
  if (from.dtype() == DType::kBFloat16 && dtype == DType::kFloat32) {
    convert<bf16, float>(from, to);
  } else if (from.dtype() == DType::kFloat32 && dtype == DType::kBFloat16) {
    convert<float, bf16>(from, to);
  } else {
    void* out = to.mutable_raw();
    parallel_for(from.numel(), kGrainElements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write_element(out, dtype, i, read_element(from.raw(), from.dtype(), i));
    });
  }
  return to;
}

}  // namespace

Tensor cast(const Tensor& tensor, DType dtype) {
  const bool integers = tensor.dtype() == DType::kInt32 || tensor.dtype() == DType::kInt64;
  require(!integers || dtype == DType::kInt64, "star_kernels: a floating tensor is needed");
  return converted(tensor, dtype);
}

Tensor widen_integers(const Tensor& tensor) { return converted(tensor, DType::kFloat64); }

}  // namespace star
