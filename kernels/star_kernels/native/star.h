// Everything an operator's cpu.cpp includes, and how one is written.
//
// HOW TO ADD AN OPERATOR
//
// 1. C++, in <folder>/cpu.cpp beside reference.py (or cpu_<part>.cpp when one file is too long; CMake finds cpu*.cpp):
//
//      #include "native/star.h"
//      namespace star {
//      namespace {
//
//      // The arithmetic, once, for every vector width and element type.
//      template <class T> void scale_row(const T* x, T* y, int64_t width, Wide<T> factor) {
//        using V = Vec<T>;
//        sweep<V>(width, [=](int64_t i, auto lanes) { (V::load(x + i, lanes) * V(factor)).store(y + i, lanes); });
//      }
//
//      // The operator: tensors in, new tensors out.
//      Tensor scale(const Tensor& x_any, double factor) {
//        require(x_any.dim() >= 1, "scale: x must be (..., D)");
//        const Tensor x = last_contiguous(x_any);
//        Tensor y = empty_like(x);
//        dispatch_dtype(x.dtype(), [&](auto element) {
//          using T = decltype(element);
//          const Rows rows(x);
//          const int64_t width = x.size(-1);
//          const T* in = x.data<T>();
//          T* out = y.mutable_data<T>();
//          parallel_for(rows.count(), grain_rows(width), [&](int64_t begin, int64_t end) {
//            for (int64_t r = begin; r < end; ++r) {
//              scale_row(in + rows.offset(r), out + r * width, width, static_cast<Wide<T>>(factor));
//            }
//          });
//        });
//        return y;
//      }
//
//      STAR_OPERATOR("scale(Tensor x, float factor) -> Tensor", scale);
//      STAR_OPERATOR("scale_backward(Tensor dy, float factor) -> Tensor", scale_backward);
//      }  // namespace
//      }  // namespace star
//
// 2. Python, in <folder>/cpu.py or cpu_<part>.py (the loader, _native.py, imports every cpu*.py): `native_operator`
//    adds the fake and the gradient and returns the function to call; `serve` hands it to dispatch.py.
//    memoryless/cpu.py and norm/cpu.py are the models.
//
// 3. Build: `cmake -S . -B build/dev -G Ninja && cmake --build build/dev`, then run with
//    STAR_KERNELS_LIBRARIES=build/dev/lib. -DSTAR_PARTS="norm;memoryless" builds (and the loader then registers) those
//    folders alone, -DSTAR_ISAS=avx512 builds one instruction set, -DSTAR_SANITIZE=ON adds AddressSanitizer and
//    UndefinedBehaviorSanitizer. STAR_KERNELS_ISA=avx2 (or plain) makes the loader take that library.
//    kernels/.clang-format gives the layout.
//
// RULES
//
// * The file is compiled once for each instruction set, into one library each, and one of them is loaded. So there is
//   no #ifdef and no run-time choice in an operator: `Vec<T>` is the widest vector there is. The flags are -std=c++17
//   -O2 without contraction: write fma, and put STAR_UNROLL before a loop over an array of vectors.
// * Element types are float, bf16 and double (`dispatch_dtype`); arithmetic, sums and states are in `Wide<T>`: float
//   for float and bf16, double for double. The double path has one lane and exists for gradcheck: do not tune it, do
//   not write it twice.
// * Never read or write outside a tensor, never multiply what is masked: `lanes` in loads and stores, `select` in
//   arithmetic.
// * Same bits for 1 and N threads, and for a row alone or in a batch: a row's arithmetic depends on its own length
//   alone; sums across rows go through `RowChunks` and `add_chunks`.
// * Outputs are new contiguous tensors, never an argument (copy a state that did not change), and every element is
//   written: under test `empty` comes filled with NaN. A position that everything is masked from is zero.
// * Inputs come in any layout: `last_contiguous` (then `Rows`) or `contiguous`. Parameters come in any floating dtype:
//   `cast` to `dtype_of<Wide<T>>()`, and cast their gradient back.
// * Offsets are int64_t. Size 0 works in every axis: no division by a size that may be 0.
// * Errors: `require(condition, "operator: what is needed")` becomes ValueError. User-facing checks are in Python.
// * Temporary memory inside a parallel body: `Scratch`. Across threads: `empty`.
// * Compile time: about 3 s for a file and instruction set, two minutes for everything on two cores. Avoid the
//   standard library's large headers; instantiate the kernel, not the loops around it.
#pragma once

#include "error.h"
#include "gemm.h"
#include "lookahead.h"
#include "math.h"
#include "operator.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "stream.h"
#include "tensor.h"
#include "vec.h"
