// The whole native interface: the operations of imbsam_fast/ops/reference.py on raw pointers.
//
// A list argument `void* const* x` holds the data pointers of one tensor per parameter; a
// null list is absent (a zero gradient, unperturbed weights, no momentum). Tensor i of every
// list has numel[i] elements of one dtype in the same dense memory order. Arithmetic runs in
// float for float32, bfloat16 and float16 data, in double for float64.
//
// `master`, for bfloat16 and float16 data, holds the weights in float, and so does the state of the
// base where it is there: theta is then what is written of them, rounded, and there is no `saved`.
#pragma once

#include <stdint.h>

namespace imbsam {

enum class DType : int { float32, float64, bfloat16, float16 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Elements that share one partial sum; reference.CHUNK.
constexpr int64_t kChunk = 32768;

// What all lists of one call share.
struct Table {
  DType dtype;
  int64_t count;         // tensors in every list
  const int64_t* numel;  // elements of each
};

// ---------------------------------------------------------------- the fused bases

// A list of a base's state, kept like the weights.
struct StateList {
  const char* name;
  bool required;  // else it may be absent
};

constexpr int kMaxState = 3, kMaxSettings = 5;

// What an update takes besides theta, saved, g_h, g_p, master and what UpdateSettings has.
struct BaseEntry {
  const char* op;  // in reference.py
  int state_count;
  StateList state[kMaxState];
  int settings;  // how many, in the order of reference.py, without lr and maximize
  bool counts;   // whether its formula needs the steps that each tensor took
};

// csrc/bases.h has the formula of each.
enum class Base : int { sgd, adam, rmsprop };

constexpr BaseEntry kBases[] = {
    // momentum, dampening, weight_decay, nesterov
    // bytes: 4n read, 2n written with all lists present (3n written with master)
    {"sgd_update_", 1, {{"m", false}}, 4, false},
    // beta1, beta2, eps, weight_decay, decoupled
    // bytes: 5n read, 3n written without v_max (6n and 4n with it; 1n more written with master)
    {"adam_update_", 3, {{"m", true}, {"v", true}, {"v_max", false}}, 5, true},
    // alpha, eps, weight_decay, momentum
    // bytes: 4n read, 2n written (1n more of each with m and with g_avg; 1n written with master)
    {"rmsprop_update_", 3, {{"v", true}, {"m", false}, {"g_avg", false}}, 4, false},
};
constexpr int kBaseCount = sizeof(kBases) / sizeof(kBases[0]);

constexpr const BaseEntry& entry(Base base) { return kBases[(int)base]; }

// A bit for each list of the state that must be there.
constexpr unsigned required_state(Base base) {
  unsigned bits = 0;
  for (int k = 0; k < entry(base).state_count; ++k)
    bits |= (unsigned)entry(base).state[k].required << k;
  return bits;
}

// The lists of one update. state[k] is null where it is absent.
struct UpdateLists {
  void* const* theta;
  const void* const* saved;
  const void* const* g_h;
  const void* const* g_p;
  void* const* state[kMaxState];
  void* const* master;
};

struct UpdateSettings {
  double lr;
  double own[kMaxSettings];  // those of BaseEntry; a flag is 0 or 1
  bool maximize;
  double grad_scale;  // the gradients are this many times too large
  bool skip;          // only restore theta
};

struct CrossEntropySettings {
  int64_t rows, classes, row_stride;  // logits are (rows, classes), unit stride along classes
  double label_smoothing;
  int64_t ignore_index;
};

// Class weights in the arithmetic dtype, one entry a class.
struct ClassWeights {
  const void *plain, *sharp;
  const void* class_weight;  // null: 1 for every class
};

namespace cpu {

// bytes: 1n read (2n with theta)
void squared_norm(const Table&, const void* const* g_t, const void* const* theta,
                  double* partials, int threads);

// bytes: 2n read, 2n written (with master 2n read, 1n written; with held 1n more each). partials:
// those of squared_norm over all parameters.
void perturb_(const Table&, void* const* theta, void* const* g_t, const void* const* master,
              void* const* held, const double* partials, int64_t partial_count, double rho,
              bool adaptive, int threads);

// The step of a base. steps[i]: the steps that tensor i took, this one included; null where the
// base has no counts. bytes: see kBases
void update_(Base, const Table&, const UpdateLists&, const int64_t* steps, const UpdateSettings&,
             int threads);

// bytes: 3n read, 2n written with all lists present
void merge_(const Table&, void* const* theta, const void* const* saved,
            const void* const* g_h, void* const* g_p, int threads);

// bytes: 2n read. Returns whether every element of g_h + g_p is finite.
bool grad_check(const Table&, const void* const* g_h, const void* const* g_p,
                double* partials, int threads);

// head, tail, b: one element each; lse: two a row, its maximum and the logarithm of its sum of
// exp(z - maximum); all in the arithmetic dtype.
// batch_size < 0: count the rows that are not ignored. Throws std::out_of_range for a target
// outside 0 .. classes-1. bytes: N·K read
void split_cross_entropy(DType, const CrossEntropySettings&, const void* logits,
                         const int64_t* targets, const ClassWeights&, double batch_size,
                         void* head, void* tail, void* b, void* lse, int threads);

// grad_logits is (rows, classes) without gaps. Rows without weight are not read.
// bytes: N·K read, N·K written
void split_cross_entropy_backward(DType, const CrossEntropySettings&, double grad_head,
                                  double grad_tail, const void* logits, const int64_t* targets,
                                  const void* lse, double b, const ClassWeights&,
                                  void* grad_logits, int threads);

// q: a label distribution for each row, in the arithmetic dtype. row_numbers: six a row, those of
// lse and, for plain and for sharp, sum_k q_k plain_k w_k, then sum_k q_k plain_k for both.
// batch_size < 0: count the rows with an element of q that is not 0. bytes: 2 N·K read
void split_soft_cross_entropy(DType, const CrossEntropySettings&, const void* logits,
                              const void* q, int64_t q_stride, const ClassWeights&,
                              double batch_size, void* head, void* tail, void* b,
                              void* row_numbers, int threads);

// Rows without weight are not read. bytes: 2 N·K read, N·K written
void split_soft_cross_entropy_backward(DType, const CrossEntropySettings&, double grad_head,
                                       double grad_tail, const void* logits, const void* q,
                                       int64_t q_stride, const void* row_numbers, double b,
                                       const ClassWeights&, void* grad_logits, int threads);

// The machine's memory limit, for benchmarks, on arrays of numel floats. stream: write a past the
// caches. bytes: read 1n; copy 1n read, 1n written; triad 2n read, 1n written
enum class Traffic : int {
  read,   // returns the sum of b in double, of float sums
  copy,   // a = b
  triad,  // a = b + 3 c
};
double bandwidth(Traffic, bool stream, float* a, const float* b, const float* c, int64_t numel,
                 int threads);

// The instruction sets this build has and this machine runs, best last; the one in use; and
// a test-only override (throws std::invalid_argument for a name that is not in the list).
int isa_count();
const char* isa_name(int index);
const char* isa_in_use();
void use_isa(const char* name);

bool has_openmp();

// Above this much data, streaming stores pay.
int64_t last_level_cache_bytes();

}  // namespace cpu

// The same operations on a CUDA device. Pointers to data are addresses on that device. Nothing is
// allocated, nothing waits for the device, and errors of a launch throw std::runtime_error.
namespace cuda {

// A cudaStream_t and the device that it belongs to.
struct Stream {
  int device;
  void* handle;
};

// One element each on the device, in the arithmetic dtype, that replaces its namesake in
// UpdateSettings (found_inf: skip, where it is not 0). Null: the setting counts.
struct DeviceScalars {
  const void *lr, *grad_scale, *found_inf;
};

// Null where these operations run on every device of this machine, else why they do not.
const char* reason_unavailable();

// bytes: 1n read (2n with theta)
void squared_norm(const Table&, const void* const* g_t, const void* const* theta,
                  double* partials, const Stream&);

// bytes: 2n read, 2n written (with master 2n read, 1n written; with held 1n more each). Every block
// sums the partials.
void perturb_(const Table&, void* const* theta, void* const* g_t, const void* const* master,
              void* const* held, const double* partials, int64_t partial_count, double rho,
              bool adaptive, const Stream&);

// The step of a base. step[i]: one float on the device, the steps that tensor i took before this
// one; null where the base has no counts. bytes: see kBases
void update_(Base, const Table&, const UpdateLists&, const void* const* step,
             const UpdateSettings&, const DeviceScalars&, const Stream&);

// bytes: 3n read, 2n written with all lists present
void merge_(const Table&, void* const* theta, const void* const* saved,
            const void* const* g_h, void* const* g_p, const Stream&);

// bytes: 2n read. *found_inf, 0 before, becomes 1 where an element of g_h + g_p is not finite.
void grad_check(const Table&, const void* const* g_h, const void* const* g_p,
                double* partials, float* found_inf, const Stream&);

// losses: scratch, one a row. A target outside 0 .. classes-1 stops the kernel with a device-side
// assertion, as in torch: telling the caller would take a synchronisation.
// bytes: N·K read
void split_cross_entropy(DType, const CrossEntropySettings&, const void* logits,
                         const int64_t* targets, const ClassWeights&, double batch_size,
                         double* losses, void* head, void* tail, void* b, void* lse,
                         const Stream&);

// grad_head, grad_tail: null for zero. weight_sum: the sum of class_weight; null where that is
// null or nothing is smoothed. Rows without weight are not read.
// bytes: N·K read, N·K written
void split_cross_entropy_backward(DType, const CrossEntropySettings&, const void* grad_head,
                                  const void* grad_tail, const void* logits,
                                  const int64_t* targets, const void* lse, const void* b,
                                  const ClassWeights&, const double* weight_sum,
                                  void* grad_logits, const Stream&);

// q: a label distribution for each row, in the arithmetic dtype. losses: scratch, three a row.
// row_numbers: six a row, as on the CPU. bytes: 2 N·K read
void split_soft_cross_entropy(DType, const CrossEntropySettings&, const void* logits,
                              const void* q, int64_t q_stride, const ClassWeights&,
                              double batch_size, double* losses, void* head, void* tail, void* b,
                              void* row_numbers, const Stream&);

// grad_head, grad_tail: null for zero. weight_sum: as in split_cross_entropy_backward. Rows without
// weight are not read. bytes: 2 N·K read, N·K written
void split_soft_cross_entropy_backward(DType, const CrossEntropySettings&, const void* grad_head,
                                       const void* grad_tail, const void* logits, const void* q,
                                       int64_t q_stride, const void* row_numbers, const void* b,
                                       const ClassWeights&, const double* weight_sum,
                                       void* grad_logits, const Stream&);

}  // namespace cuda
}  // namespace imbsam
