// Work shared out over torch's own threads, so that torch.set_num_threads and the caller's nesting are honoured.
//
// Results must not depend on the number of threads: a chunk's work is a function of its index alone, and sums across
// chunks go through `RowChunks` or another fixed partition, never through whoever comes first.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#include "error.h"
#include "shim.h"
#include "vec.h"

namespace star {

// Elements below which a second thread does not pay: starting one costs about 5 us, in which a core streams 100 KB.
constexpr int64_t kGrainElements = 16384;

// Rows a thread should take at least, when one row costs `elements` simple element operations.
inline int64_t grain_rows(int64_t elements) {
  const int64_t rows = kGrainElements / (elements > 0 ? elements : 1);
  return rows > 0 ? rows : 1;
}

inline int64_t num_threads() {
  uint32_t count = 1;
  check_torch(shim.torch_get_num_threads(&count), "torch_get_num_threads");
  return count;
}

// body(begin, end) for consecutive ranges that cover [0, count), each at least `grain` long where possible.
template <class F> inline void parallel_for(int64_t count, int64_t grain, F&& body) {
  if (count <= 0) return;
  if (count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  struct Context {
    F* body;
    std::exception_ptr error;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
  } context{&body, nullptr};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    auto* shared = static_cast<Context*>(opaque);
    try {
      (*shared->body)(begin, end);
    } catch (...) {
      if (!shared->failed.test_and_set()) shared->error = std::current_exception();
    }
  };
  const int32_t status = shim.torch_parallel_for(0, count, grain, run, &context);
  if (context.error) std::rethrow_exception(context.error);
  check_torch(status, "torch_parallel_for");
}

// body(task) for each of [0, count), handed out one by one: for tasks of unequal length.
template <class F> inline void parallel_tasks(int64_t count, F&& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = count < num_threads() ? count : num_threads();
  parallel_for(workers, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
  });
}

// The rows of a sum over rows, cut into chunks that depend on the sizes alone: each chunk is summed by one thread into
// its own partial result, and the partial results are added in order.
struct RowChunks {
  static constexpr int64_t kMost = 64;
  int64_t rows;
  int64_t count;

  // `grain`: rows that make a chunk worth its partial result.
  RowChunks(int64_t num_rows, int64_t grain) : rows(num_rows) {
    const int64_t wanted = num_rows / (grain > 0 ? grain : 1);
    count = wanted < 1 ? 1 : (wanted > kMost ? kMost : wanted);
  }
  int64_t begin(int64_t chunk) const { return rows * chunk / count; }
};

// out[i] = sum over chunks of partial[chunk * width + i], chunk 0 first. `out` and `partial` hold V::Scalar.
template <class V>
inline void add_chunks(const typename V::Scalar* partial, int64_t chunks, int64_t width, typename V::Scalar* out) {
  parallel_for(width, grain_rows(chunks), [&](int64_t begin, int64_t end) {
    sweep<V>(end - begin, [&](int64_t i, auto lanes) {
      V sum = V::load(partial + begin + i, lanes);
      for (int64_t c = 1; c < chunks; ++c) sum = sum + V::load(partial + c * width + begin + i, lanes);
      sum.store(out + begin + i, lanes);
    });
  });
}

}  // namespace star
