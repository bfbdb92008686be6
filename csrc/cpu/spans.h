// What each instruction set provides: every operation on one span of one tensor.
//
// kernels.cpp is compiled once per instruction set and fills one table for each; drivers.cpp
// spreads spans over tensors and threads. No std:: templates on this side: the linker would
// keep one copy of them for all instruction sets.
#pragma once

#include "../imbsam.h"

namespace imbsam {
namespace cpu {

// What cross-entropy needs of a row of logits z.
struct RowSums {
  double max;
  double log_sum;       // log sum_k exp(z_k - max)
  double weighted_sum;  // sum_k w_k (z_k - max)
};

// What a label distribution q makes of a row, for plain [0] and sharp [1]: with a_k = q_k plain_k
struct SoftSums {
  double dot[2];       // sum_k a_k w_k (z_k - max)
  double weighted[2];  // sum_k a_k w_k
  double mass[2];      // sum_k a_k
  bool counted;        // whether any q_k is not 0
};

// One span of the lists of an update, n elements; null: absent.
struct UpdateSpan {
  void* theta;
  const void *saved, *g_h, *g_p;
  void* state[kMaxState];
  void* master;
  int64_t n;
  int64_t step;  // of this tensor, this one included; 0 where the base has no counts
};

struct Spans {
  // Sum of squares of g, or of theta g where theta is not null.
  double (*squared_norm)(const void* g_t, const void* theta, int64_t n);
  // Null master, held: absent, and below saved and g_h too.
  void (*perturb_)(void* theta, void* g_t, const void* master, void* held, int64_t n,
                   double scale, bool adaptive);
  // By Base. stream: write theta past the caches.
  void (*update_[kBaseCount])(const UpdateSpan&, const UpdateSettings&, bool stream);
  void (*merge_)(void* theta, const void* saved, const void* g_h, void* g_p, int64_t n,
                 bool stream);
  // Sum of squares of g_h + g_p; *finite is cleared where an element is not.
  double (*grad_check)(const void* g_h, const void* g_p, int64_t n, bool* finite);
  // w null: 1 for every class. weighted_sum is left 0 unless it is asked for.
  RowSums (*row_sums)(const void* z, int64_t classes, const void* w, bool weighted);
  // dz_k = soft exp(z_k - max - log_sum) - smooth w_k - (k = y ? hard : 0)
  void (*softmax_gradient)(const void* z, void* dz, int64_t classes, double max, double log_sum,
                           double soft, double smooth, const void* w, int64_t y, double hard);
  // w null: 1 for every class.
  SoftSums (*soft_sums)(const void* z, const void* q, const void* plain, const void* sharp,
                        const void* w, int64_t classes, double max);
  // dz_k = soft exp(z_k - max - log_sum) - q_k v_k - smooth w_k
  void (*soft_gradient)(const void* z, const void* q, const void* v, const void* w, void* dz,
                        int64_t classes, double max, double log_sum, double soft, double smooth);
  double (*element)(const void* x, int64_t i);
};

struct Isa {
  const char* name;
  bool (*supported)();
  Spans spans[4];  // by DType
  double (*bandwidth)(Traffic, bool stream, float* a, const float* b, const float* c, int64_t n);
};

extern const Isa isa_baseline;
#if defined(IMBSAM_X86)
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#endif

}  // namespace cpu
}  // namespace imbsam
