// Spreads every operation over tensors and threads: one parallel region each, balanced over the
// flattened elements of all tensors, with results that do not depend on the number of threads.

#include <algorithm>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../arithmetic.h"
#include "../check.h"
#include "parallel.h"

namespace imbsam {
namespace cpu {
namespace {

// ---------------------------------------------------------------- instruction sets

const std::vector<const Isa*>& supported_isas() {
  static const std::vector<const Isa*> isas = [] {
    std::vector<const Isa*> found = {&isa_baseline};
#if defined(IMBSAM_X86)
    for (const Isa* isa : {&isa_avx2, &isa_avx512})
      if (isa->supported()) found.push_back(isa);
#endif
    return found;
  }();
  return isas;
}

const Isa*& isa() {
  static const Isa* in_use = supported_isas().back();
  return in_use;
}

}  // namespace

const Spans& spans_for(DType dtype) { return isa()->spans[(int)dtype]; }

namespace {

// ---------------------------------------------------------------- threads

// The flattened element range of one thread; boundaries on multiples of a cache line's floats.
struct Share {
  int64_t begin, end;
  Share(int64_t total, int thread, int threads)
      : begin(boundary(total, thread, threads)), end(boundary(total, thread + 1, threads)) {}

 private:
  static int64_t boundary(int64_t total, int thread, int threads) {
    return thread == threads ? total : total / threads * thread / 16 * 16;
  }
};

// All tensors of a call as one range of elements.
class Flattened {
 public:
  explicit Flattened(const Table& table) : numel_(table.numel), starts_(table.count + 1, 0) {
    for (int64_t i = 0; i < table.count; ++i) starts_[i + 1] = starts_[i] + table.numel[i];
  }

  int64_t total() const { return starts_.back(); }

  // Calls f(tensor, first element, elements) for pieces of at most a chunk, in order.
  template <class F>
  void forward(Share share, F f) const {
    for (int64_t i = tensor_at(share.begin); starts_[i] < share.end; ++i) {
      const int64_t last = std::min(share.end - starts_[i], numel_[i]);
      for (int64_t at = std::max<int64_t>(share.begin - starts_[i], 0); at < last; at += kChunk)
        f(i, at, std::min(kChunk, last - at));
      if (i + 1 == count()) return;
    }
  }

  // The same in reverse order: what was read last is met first.
  template <class F>
  void backward(Share share, F f) const {
    if (share.begin == share.end) return;
    for (int64_t i = tensor_at(share.end - 1); i >= 0; --i) {
      const int64_t first = std::max<int64_t>(share.begin - starts_[i], 0);
      for (int64_t end = std::min(share.end - starts_[i], numel_[i]); end > first;) {
        const int64_t at = std::max(first, end - kChunk);
        f(i, at, end - at);
        end = at;
      }
      if (starts_[i] <= share.begin) return;
    }
  }

  // Calls f(tensor, first element, elements, chunk) for the chunks that start in the share.
  // Chunks are fixed by the tensors alone: what is summed per chunk depends on nothing else.
  template <class F>
  void chunks(Share share, F f) const {
    int64_t chunk = 0;
    for (int64_t i = 0; i < count() && starts_[i] < share.end; ++i) {
      for (int64_t at = 0; at < numel_[i]; at += kChunk, ++chunk) {
        const int64_t position = starts_[i] + at;
        if (position >= share.begin && position < share.end)
          f(i, at, std::min(kChunk, numel_[i] - at), chunk);
      }
    }
  }

 private:
  int64_t count() const { return (int64_t)starts_.size() - 1; }
  int64_t tensor_at(int64_t element) const {
    return std::upper_bound(starts_.begin(), starts_.end(), element) - starts_.begin() - 1;
  }

  const int64_t* numel_;
  std::vector<int64_t> starts_;
};

// ---------------------------------------------------------------- pointers

char* at(void* const* list, int64_t tensor, int64_t element, int64_t size) {
  return list ? (char*)list[tensor] + element * size : nullptr;
}

const char* at(const void* const* list, int64_t tensor, int64_t element, int64_t size) {
  return list ? (const char*)list[tensor] + element * size : nullptr;
}

// The size of an element of the base's state, which is kept like the master weights.
int64_t size_of_state(const Table& table, bool has_master) {
  return has_master && table.dtype != DType::float64 ? 4 : size_of(table.dtype);
}

// ---------------------------------------------------------------- caches

// Writing past the caches pays only where the data would not have stayed in them.
bool exceeds_cache(const Table& table, int64_t elements, int lists) {
  return elements * size_of(table.dtype) * lists > last_level_cache_bytes();
}

}  // namespace

// ---------------------------------------------------------------- the optimizer phases

void squared_norm(const Table& table, const void* const* g_t, const void* const* theta,
                  double* partials, int threads) {
  const Flattened all(table);
  const int64_t size = size_of(table.dtype);
  const Spans& spans = spans_for(table.dtype);
  parallel(threads, all.total(), [&](int thread, int count) {
    all.chunks(Share(all.total(), thread, count), [&](int64_t i, int64_t e, int64_t n, int64_t c) {
      partials[c] = spans.squared_norm(at(g_t, i, e, size), at(theta, i, e, size), n);
    });
  });
}

void perturb_(const Table& table, void* const* theta, void* const* g_t, const void* const* master,
              void* const* held, const double* partials, int64_t partial_count, double rho,
              bool adaptive, int threads) {
  double squared_norm = 0;
  for (int64_t i = 0; i < partial_count; ++i) squared_norm += partials[i];
  const double scale = table.dtype == DType::float64
                           ? perturbation_scale<double>(squared_norm, rho)
                           : perturbation_scale<float>(squared_norm, rho);
  const Flattened all(table);
  const int64_t size = size_of(table.dtype);
  const Spans& spans = spans_for(table.dtype);
  parallel(threads, all.total(), [&](int thread, int count) {
    // Backwards: what squared_norm read last is still in the last-level cache.
    all.backward(Share(all.total(), thread, count), [&](int64_t i, int64_t e, int64_t n) {
      spans.perturb_(at(theta, i, e, size), at(g_t, i, e, size),
                     at(master, i, e, size_of_state(table, true)), at(held, i, e, size), n, scale,
                     adaptive);
    });
  });
}

void update_(Base base, const Table& table, const UpdateLists& lists, const int64_t* steps,
             const UpdateSettings& settings, int threads) {
  const Flattened all(table);
  const int64_t size = size_of(table.dtype), kept = size_of_state(table, lists.master != nullptr);
  const auto update = spans_for(table.dtype).update_[(int)base];
  // theta, saved, g_h, g_p and the required state, or one list of it.
  int required = 0;
  for (unsigned bits = required_state(base); bits; bits >>= 1) required += bits & 1;
  const bool stream = exceeds_cache(table, all.total(), 4 + std::max(required, 1));
  parallel(threads, all.total(), [&](int thread, int count) {
    all.forward(Share(all.total(), thread, count), [&](int64_t i, int64_t e, int64_t n) {
      UpdateSpan span = {at(lists.theta, i, e, size), at(lists.saved, i, e, size),
                         at(lists.g_h, i, e, size),   at(lists.g_p, i, e, size),
                         {},                          at(lists.master, i, e, kept),
                         n,                           steps ? steps[i] : 0};
      for (int k = 0; k < entry(base).state_count; ++k)
        span.state[k] = at(lists.state[k], i, e, kept);
      update(span, settings, stream);
    });
  });
}

void merge_(const Table& table, void* const* theta, const void* const* saved,
            const void* const* g_h, void* const* g_p, int threads) {
  const Flattened all(table);
  const int64_t size = size_of(table.dtype);
  const Spans& spans = spans_for(table.dtype);
  const bool stream = exceeds_cache(table, all.total(), 4);
  parallel(threads, all.total(), [&](int thread, int count) {
    all.forward(Share(all.total(), thread, count), [&](int64_t i, int64_t e, int64_t n) {
      spans.merge_(at(theta, i, e, size), at(saved, i, e, size), at(g_h, i, e, size),
                   at(g_p, i, e, size), n, stream);
    });
  });
}

bool grad_check(const Table& table, const void* const* g_h, const void* const* g_p,
                double* partials, int threads) {
  const Flattened all(table);
  const int64_t size = size_of(table.dtype);
  const Spans& spans = spans_for(table.dtype);
  std::vector<char> finite(std::max(threads, 1), true);
  parallel(threads, all.total(), [&](int thread, int count) {
    bool all_finite = true;
    all.chunks(Share(all.total(), thread, count), [&](int64_t i, int64_t e, int64_t n, int64_t c) {
      partials[c] = spans.grad_check(at(g_h, i, e, size), at(g_p, i, e, size), n, &all_finite);
    });
    finite[thread] = all_finite;
  });
  return std::all_of(finite.begin(), finite.end(), [](char f) { return f; });
}

// ---------------------------------------------------------------- the machine

double bandwidth(Traffic traffic, bool stream, float* a, const float* b, const float* c,
                 int64_t numel, int threads) {
  std::vector<double> sums(std::max(threads, 1), 0.0);
  parallel(threads, numel, [&](int thread, int count) {
    const Share share(numel, thread, count);
    const int64_t at = share.begin;
    sums[thread] = isa()->bandwidth(traffic, stream, a ? a + at : a, b + at, c ? c + at : c,
                                    share.end - at);
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    // sysconf sums the caches of a whole socket on some machines; a core can fill one.
    std::ifstream size("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t number = 0;
    char unit = 0;
    if (size >> number >> unit && number > 0) return unit == 'M' ? number << 20 : number << 10;
    return (int64_t)32 << 20;
  }();
  return bytes;
}

int isa_count() { return (int)supported_isas().size(); }
const char* isa_name(int index) { return supported_isas().at(index)->name; }
const char* isa_in_use() { return isa()->name; }

void use_isa(const char* name) {
  for (const Isa* candidate : supported_isas())
    if (std::string(candidate->name) == name) {
      isa() = candidate;
      return;
    }
  IMBSAM_CHECK(false, "isa is '" << name << "', which this build or machine does not have");
}

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

}  // namespace cpu
}  // namespace imbsam
