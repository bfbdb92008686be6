// The tensor lists of one call, as addresses: what can be checked of them before anything is written.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "imbsam.h"

namespace imbsam {

// One data pointer a tensor; empty: an absent list. Python passes tensors, or addresses.
struct Pointers : std::vector<uintptr_t> {};

// The elements of each tensor.
struct Sizes : std::vector<int64_t> {};

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// The lists of one call, checked before anything is written.
class Lists {
 public:
  Lists(const char* op, int dtype, const Sizes& numel)
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
  void disjoint() const {
    // Step after step memory comes in one order, and looking is cheaper than sorting.
    thread_local std::map<std::pair<const char*, size_t>, std::vector<uint32_t>> orders;
    if (orders.size() > kOrders) orders.clear();
    std::vector<uint32_t>& order = orders[{op_, blocks_.size()}];
    if (order.size() == blocks_.size() && !first_overlap(order)) return;
    order.resize(blocks_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](uint32_t a, uint32_t b) {
      return blocks_[a].begin < blocks_[b].begin;
    });
    if (const size_t i = first_overlap(order)) {
      const Block &a = blocks_[order[i - 1]], &b = blocks_[order[i]];
      IMBSAM_CHECK(false, op_ << ": " << a.name << "[" << a.index << "] and " << b.name << "["
                              << b.index << "] overlap in memory");
    }
  }

 private:
  struct Block {
    uintptr_t begin, end;
    const char* name;
    size_t index;
  };
  static constexpr size_t kOrders = 64;  // of as many operations and numbers of tensors

  // The first place in the order where a block does not lie behind the one before; 0: none.
  size_t first_overlap(const std::vector<uint32_t>& order) const {
    for (size_t i = 1; i < order.size(); ++i)
      if (blocks_[order[i - 1]].end > blocks_[order[i]].begin) return i;
    return 0;
  }

  const char* op_;
  DType dtype_;
  const Sizes& numel_;
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
