// What the drivers share: the kernels of the instruction set in use, and one parallel region.
#pragma once

#include <algorithm>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "spans.h"

namespace imbsam {
namespace cpu {

// Of the instruction set in use.
const Spans& spans_for(DType dtype);

// Below this many elements per thread, starting the threads costs more than it saves.
constexpr int64_t kElementsPerThread = 16384;

// Runs body(thread, threads) in one parallel region.
template <class Body>
void parallel(int threads, int64_t elements, Body body) {
  const int64_t useful = std::max<int64_t>(1, elements / kElementsPerThread);
  threads = (int)std::min<int64_t>(std::max(threads, 1), useful);
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

}  // namespace cpu
}  // namespace imbsam
