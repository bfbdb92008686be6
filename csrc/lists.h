// The tensor lists of one call, as addresses: what can be checked of them before anything is written.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <string>
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

// The lists of one update, as Python passes them; state holds those of kBases, and [] for an absent
// one.
struct UpdatePointers {
  const Pointers &theta, &saved, &g_h, &g_p;
  const std::vector<Pointers>& state;
  const Pointers& master;
};

inline Base base_of(const std::string& op) {
  for (int i = 0; i < kBaseCount; ++i)
    if (op == kBases[i].op) return (Base)i;
  IMBSAM_CHECK(false, "op is '" << op << "', expected the update of a base");
  return {};
}

inline UpdateLists checked(Lists& lists, Base base, const UpdatePointers& x) {
  const BaseEntry& entry = imbsam::entry(base);
  IMBSAM_CHECK((int)x.state.size() == entry.state_count,
               entry.op << ": state has " << x.state.size() << " lists, expected "
                        << entry.state_count);
  lists.required("theta", x.theta);
  lists.optional("saved", x.saved);
  lists.optional("g_h", x.g_h);
  lists.required("g_p", x.g_p);
  const DType kept = lists.kept_with(x.master);
  UpdateLists found = {out(x.theta), in(x.saved), in(x.g_h), in(x.g_p), {}, out(x.master)};
  for (int k = 0; k < entry.state_count; ++k) {
    if (entry.state[k].required)
      lists.required(entry.state[k].name, x.state[k], kept);
    else
      lists.optional(entry.state[k].name, x.state[k], kept);
    found.state[k] = out(x.state[k]);
  }
  lists.disjoint();
  return found;
}

inline UpdateSettings checked(Base base, double lr, const std::vector<double>& own, bool maximize,
                              double grad_scale, bool skip) {
  IMBSAM_CHECK((int)own.size() == entry(base).settings,
               entry(base).op << ": settings has " << own.size() << " numbers, expected "
                              << entry(base).settings);
  UpdateSettings settings = {lr, {}, maximize, grad_scale, skip};
  std::copy(own.begin(), own.end(), settings.own);
  return settings;
}

// What was counted, one float or double a tensor.
class StepCounts {
 public:
  // Empty step: nothing is counted, which a base with counts is not content with.
  StepCounts(Base base, const Pointers& step, int dtype, size_t count)
      : step_(step), dtype_((DType)dtype) {
    const char* op = entry(base).op;
    IMBSAM_CHECK(dtype == 0 || dtype == 1, op << ": step_dtype is " << dtype
                                              << ", expected 0 or 1");
    if (step.empty() && !entry(base).counts) return;
    IMBSAM_CHECK(step.size() == count, op << ": step has " << step.size() << " tensors, expected "
                                          << count);
    for (size_t i = 0; i < count; ++i) {
      IMBSAM_CHECK(step[i], op << ": step[" << i << "] is a null pointer");
      next_.push_back((int64_t)(dtype_ == DType::float64 ? *(double*)pointer(step[i])
                                                         : *(float*)pointer(step[i])) + 1);
    }
  }

  const int64_t* next() const { return next_.empty() ? nullptr : next_.data(); }

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
