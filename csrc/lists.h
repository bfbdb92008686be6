// The tensor lists of one call, as addresses: what can be checked of them before anything is written.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "imbsam.h"

namespace imbsam {

// One data pointer a tensor; empty: an absent list. Python passes tensors, or addresses.
struct Pointers : std::vector<uintptr_t> {};

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// The lists of one call, checked before anything is written.
class Lists {
 public:
  Lists(const char* op, int dtype, const std::vector<int64_t>& numel)
      : op_(op), dtype_((DType)dtype), numel_(numel) {
    IMBSAM_CHECK(dtype >= 0 && dtype <= 3, op << ": dtype is " << dtype << ", expected 0 to 3");
    for (size_t i = 0; i < numel.size(); ++i)
      IMBSAM_CHECK(numel[i] >= 0, op << ": numel[" << i << "] is " << numel[i] << ", expected >= 0");
  }

  Table table() const { return {dtype_, (int64_t)numel_.size(), numel_.data()}; }

  int64_t chunks() const {
    int64_t sum = 0;
    for (int64_t n : numel_) sum += (n + kChunk - 1) / kChunk;
    return sum;
  }

  void required(const char* name, const Pointers& list) { required(name, list, dtype_); }

  void required(const char* name, const Pointers& list, DType dtype) {
    IMBSAM_CHECK(list.size() == numel_.size(), op_ << ": " << name << " has " << list.size()
                                                   << " tensors, expected " << numel_.size());
    for (size_t i = 0; i < list.size(); ++i) {
      IMBSAM_CHECK(list[i] || numel_[i] == 0,
                   op_ << ": " << name << "[" << i << "] is a null pointer, expected "
                       << numel_[i] << " elements");
      if (numel_[i])
        blocks_.push_back({list[i], list[i] + (uintptr_t)(numel_[i] * size_of(dtype)), name, i});
    }
  }

  void optional(const char* name, const Pointers& list) { optional(name, list, dtype_); }

  void optional(const char* name, const Pointers& list, DType dtype) {
    if (!list.empty()) required(name, list, dtype);
  }

  // Takes the master weights; returns the dtype in which they and the base's state are kept.
  DType kept_with(const Pointers& master) {
    if (master.empty()) return dtype_;
    IMBSAM_CHECK(size_of(dtype_) == 2, op_ << ": master has " << master.size()
                                           << " tensors, expected none for dtype " << (int)dtype_);
    required("master", master, DType::float32);
    return DType::float32;
  }

  // For operations that write: no two tensors may share memory.
  void disjoint() {
    const auto before = [](const Block& a, const Block& b) { return a.begin < b.begin; };
    if (!std::is_sorted(blocks_.begin(), blocks_.end(), before))
      std::sort(blocks_.begin(), blocks_.end(), before);
    for (size_t i = 1; i < blocks_.size(); ++i) {
      const Block &a = blocks_[i - 1], &b = blocks_[i];
      IMBSAM_CHECK(a.end <= b.begin, op_ << ": " << a.name << "[" << a.index << "] and " << b.name
                                         << "[" << b.index << "] overlap in memory");
    }
  }

 private:
  struct Block {
    uintptr_t begin, end;
    const char* name;
    size_t index;
  };
  const char* op_;
  DType dtype_;
  const std::vector<int64_t>& numel_;
  std::vector<Block> blocks_;
};

// uintptr_t and void* have the same representation wherever this builds.
static_assert(sizeof(uintptr_t) == sizeof(void*), "pointers are passed as integers");
inline void* const* out(const Pointers& list) {
  return list.empty() ? nullptr : reinterpret_cast<void* const*>(list.data());
}
inline const void* const* in(const Pointers& list) {
  return list.empty() ? nullptr : reinterpret_cast<const void* const*>(list.data());
}

inline void check_sgd_lists(Lists& lists, const Pointers& theta, const Pointers& saved,
                     const Pointers& g_h, const Pointers& g_p, const Pointers& m,
                     const Pointers& master) {
  lists.required("theta", theta);
  lists.optional("saved", saved);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  lists.optional("m", m, lists.kept_with(master));
  lists.disjoint();
}

inline void check_adam_lists(Lists& lists, const Pointers& theta, const Pointers& saved,
                      const Pointers& g_h, const Pointers& g_p, const Pointers& m,
                      const Pointers& v, const Pointers& v_max, const Pointers& master) {
  lists.required("theta", theta);
  lists.optional("saved", saved);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  const DType kept = lists.kept_with(master);
  lists.required("m", m, kept);
  lists.required("v", v, kept);
  lists.optional("v_max", v_max, kept);
  lists.disjoint();
}

// What was counted, one float or double a tensor.
class StepCounts {
 public:
  StepCounts(const Pointers& step, int dtype, size_t count) : step_(step), dtype_((DType)dtype) {
    IMBSAM_CHECK(dtype == 0 || dtype == 1,
                 "adam_update_: step_dtype is " << dtype << ", expected 0 or 1");
    IMBSAM_CHECK(step.size() == count,
                 "adam_update_: step has " << step.size() << " tensors, expected " << count);
    for (size_t i = 0; i < count; ++i) {
      IMBSAM_CHECK(step[i], "adam_update_: step[" << i << "] is a null pointer");
      next_.push_back((int64_t)(dtype_ == DType::float64 ? *(double*)pointer(step[i])
                                                         : *(float*)pointer(step[i])) + 1);
    }
  }

  const int64_t* next() const { return next_.data(); }

  void advance() const {
    for (uintptr_t step : step_) {
      if (dtype_ == DType::float64)
        *(double*)pointer(step) += 1;
      else
        *(float*)pointer(step) += 1;
    }
  }

 private:
  const Pointers& step_;
  DType dtype_;
  std::vector<int64_t> next_;
};

}  // namespace imbsam
