// The losses, spread over rows and threads: sums over rows have one order, whatever the threads.

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace imbsam {
namespace cpu {

namespace {

// The class weights of a call, read as doubles.
class RowWeights {
 public:
  RowWeights(DType dtype, const CrossEntropySettings& settings, const ClassWeights& weights)
      : spans_(spans_for(dtype == DType::float64 ? DType::float64 : DType::float32)),
        settings_(settings),
        weights_(weights) {
    if (settings.label_smoothing == 0) return;
    smooth_ = settings.label_smoothing / (double)settings.classes;
    for (int64_t k = 0; k < settings.classes; ++k) smooth_sum_ += smooth_ * class_weight(k);
  }

  double plain(int64_t y) const { return spans_.element(weights_.plain, y); }
  double sharp(int64_t y) const { return spans_.element(weights_.sharp, y); }
  double hard(int64_t y) const { return (1 - settings_.label_smoothing) * class_weight(y); }
  double smooth() const { return smooth_; }          // s / K
  double smooth_sum() const { return smooth_sum_; }  // s / K sum_k w_k

  // In the arithmetic dtype, as the logits' gradient and lse are.
  double read(const void* x, int64_t i) const { return spans_.element(x, i); }

 private:
  double class_weight(int64_t k) const {
    return weights_.class_weight ? spans_.element(weights_.class_weight, k) : 1.0;
  }

  const Spans& spans_;
  const CrossEntropySettings& settings_;
  const ClassWeights& weights_;
  double smooth_ = 0, smooth_sum_ = 0;
};

void write(DType dtype, void* x, int64_t i, double value) {
  if (dtype == DType::float64)
    ((double*)x)[i] = value;
  else
    ((float*)x)[i] = (float)value;
}

}  // namespace

void split_cross_entropy(DType dtype, const CrossEntropySettings& s, const void* logits,
                         const int64_t* targets, const ClassWeights& class_weights,
                         double batch_size, void* head, void* tail, void* b, void* lse,
                         int threads) {
  for (int64_t i = 0; i < s.rows; ++i)
    if (targets[i] != s.ignore_index && (targets[i] < 0 || targets[i] >= s.classes))
      throw std::out_of_range("targets[" + std::to_string(i) + "] is " +
                              std::to_string(targets[i]) + ", expected 0 to " +
                              std::to_string(s.classes - 1) + " or ignore_index " +
                              std::to_string(s.ignore_index));
  const Spans& spans = spans_for(dtype);
  const RowWeights weights(dtype, s, class_weights);
  std::vector<double> losses(s.rows, 0.0);
  parallel(threads, s.rows * s.classes, [&](int thread, int count) {
    for (int64_t i = s.rows * thread / count; i < s.rows * (thread + 1) / count; ++i) {
      const char* z = (const char*)logits + i * s.row_stride * size_of(dtype);
      const RowSums row =
          spans.row_sums(z, s.classes, class_weights.class_weight, weights.smooth() > 0);
      write(dtype, lse, 2 * i, row.max);
      write(dtype, lse, 2 * i + 1, row.log_sum);
      if (targets[i] == s.ignore_index) continue;
      losses[i] = weights.hard(targets[i]) *
                  (row.max - spans.element(z, targets[i]) + row.log_sum);
      if (weights.smooth() > 0)
        losses[i] += weights.smooth_sum() * row.log_sum - weights.smooth() * row.weighted_sum;
    }
  });
  double head_sum = 0, tail_sum = 0, counted = 0;
  for (int64_t i = 0; i < s.rows; ++i) {  // in one order, whatever the number of threads
    if (targets[i] == s.ignore_index) continue;
    counted += 1;
    // A row that carries no weight counts nothing whatever its loss is.
    const double plain = weights.plain(targets[i]), sharp = weights.sharp(targets[i]);
    if (plain != 0) head_sum += plain * losses[i];
    if (sharp != 0) tail_sum += sharp * losses[i];
  }
  const double divisor = batch_size < 0 ? counted : batch_size;
  write(dtype, head, 0, head_sum / std::max(divisor, 1.0));
  write(dtype, tail, 0, tail_sum / std::max(divisor, 1.0));
  write(dtype, b, 0, divisor);
}

void split_cross_entropy_backward(DType dtype, const CrossEntropySettings& s, double grad_head,
                                  double grad_tail, const void* logits, const int64_t* targets,
                                  const void* lse, double b, const ClassWeights& class_weights,
                                  void* grad_logits, int threads) {
  const Spans& spans = spans_for(dtype);
  const RowWeights weights(dtype, s, class_weights);
  const int64_t size = size_of(dtype);
  parallel(threads, s.rows * s.classes, [&](int thread, int count) {
    for (int64_t i = s.rows * thread / count; i < s.rows * (thread + 1) / count; ++i) {
      char* dz = (char*)grad_logits + i * s.classes * size;
      const int64_t y = targets[i];
      double row = 0;
      if (y != s.ignore_index)
        row = (grad_head * weights.plain(y) + grad_tail * weights.sharp(y)) / std::max(b, 1.0);
      if (row == 0) {
        std::fill(dz, dz + s.classes * size, 0);
        continue;
      }
      spans.softmax_gradient((const char*)logits + i * s.row_stride * size, dz, s.classes,
                             weights.read(lse, 2 * i), weights.read(lse, 2 * i + 1),
                             row * (weights.hard(y) + weights.smooth_sum()),
                             row * weights.smooth(), class_weights.class_weight, y,
                             row * weights.hard(y));
    }
  });
}

// ---------------------------------------------------------------- label distributions

namespace {

enum RowNumber { kMax, kLogSum, kWeighted, kMass = kWeighted + 2, kRowNumbers = kMass + 2 };

}  // namespace

void split_soft_cross_entropy(DType dtype, const CrossEntropySettings& s, const void* logits,
                              const void* q, int64_t q_stride, const ClassWeights& class_weights,
                              double batch_size, void* head, void* tail, void* b,
                              void* row_numbers, int threads) {
  const Spans& spans = spans_for(dtype);
  const RowWeights weights(dtype, s, class_weights);
  const int64_t q_size = dtype == DType::float64 ? 8 : 4;
  std::vector<double> losses(2 * s.rows, 0.0);
  std::vector<char> counts(s.rows, 0);
  parallel(threads, s.rows * s.classes, [&](int thread, int count) {
    for (int64_t i = s.rows * thread / count; i < s.rows * (thread + 1) / count; ++i) {
      const char* z = (const char*)logits + i * s.row_stride * size_of(dtype);
      const RowSums row =
          spans.row_sums(z, s.classes, class_weights.class_weight, weights.smooth() > 0);
      const SoftSums sums =
          spans.soft_sums(z, (const char*)q + i * q_stride * q_size, class_weights.plain,
                          class_weights.sharp, class_weights.class_weight, s.classes, row.max);
      const double smoothed =
          weights.smooth_sum() * row.log_sum - weights.smooth() * row.weighted_sum;
      write(dtype, row_numbers, kRowNumbers * i + kMax, row.max);
      write(dtype, row_numbers, kRowNumbers * i + kLogSum, row.log_sum);
      counts[i] = sums.counted;
      for (int part = 0; part < 2; ++part) {
        write(dtype, row_numbers, kRowNumbers * i + kWeighted + part, sums.weighted[part]);
        write(dtype, row_numbers, kRowNumbers * i + kMass + part, sums.mass[part]);
        // A row that carries no weight counts nothing whatever its loss is.
        if (sums.mass[part] == 0) continue;
        double loss = (1 - s.label_smoothing) *
                      (sums.weighted[part] * row.log_sum - sums.dot[part]);
        if (weights.smooth() > 0) loss += sums.mass[part] * smoothed;
        losses[2 * i + part] = loss;
      }
    }
  });
  double sums[2] = {}, counted = 0;
  for (int64_t i = 0; i < s.rows; ++i) {  // in one order, whatever the number of threads
    counted += counts[i];
    for (int part = 0; part < 2; ++part) sums[part] += losses[2 * i + part];
  }
  const double divisor = batch_size < 0 ? counted : batch_size;
  write(dtype, head, 0, sums[0] / std::max(divisor, 1.0));
  write(dtype, tail, 0, sums[1] / std::max(divisor, 1.0));
  write(dtype, b, 0, divisor);
}

void split_soft_cross_entropy_backward(DType dtype, const CrossEntropySettings& s,
                                       double grad_head, double grad_tail, const void* logits,
                                       const void* q, int64_t q_stride, const void* row_numbers,
                                       double b, const ClassWeights& class_weights,
                                       void* grad_logits, int threads) {
  const Spans& spans = spans_for(dtype);
  const RowWeights weights(dtype, s, class_weights);
  const int64_t size = size_of(dtype), q_size = dtype == DType::float64 ? 8 : 4;
  const double factors[2] = {grad_head / std::max(b, 1.0), grad_tail / std::max(b, 1.0)};
  std::vector<double> room(s.classes);  // for classes numbers in the arithmetic dtype
  for (int64_t k = 0; k < s.classes; ++k)
    write(dtype, room.data(), k,
          weights.hard(k) * (factors[0] * weights.plain(k) + factors[1] * weights.sharp(k)));
  parallel(threads, s.rows * s.classes, [&](int thread, int count) {
    for (int64_t i = s.rows * thread / count; i < s.rows * (thread + 1) / count; ++i) {
      char* dz = (char*)grad_logits + i * s.classes * size;
      double weighted = 0, mass = 0;
      bool carries = false;
      for (int part = 0; part < 2; ++part) {
        const double of_row = weights.read(row_numbers, kRowNumbers * i + kMass + part);
        if (factors[part] == 0 || of_row == 0) continue;
        carries = true;
        mass += factors[part] * of_row;
        weighted +=
            factors[part] * weights.read(row_numbers, kRowNumbers * i + kWeighted + part);
      }
      if (!carries) {
        std::fill(dz, dz + s.classes * size, 0);
        continue;
      }
      spans.soft_gradient((const char*)logits + i * s.row_stride * size,
                          (const char*)q + i * q_stride * q_size, room.data(),
                          class_weights.class_weight, dz, s.classes,
                          weights.read(row_numbers, kRowNumbers * i + kMax),
                          weights.read(row_numbers, kRowNumbers * i + kLogSum),
                          (1 - s.label_smoothing) * weighted + weights.smooth_sum() * mass,
                          weights.smooth() * mass);
    }
  });
}

}  // namespace cpu
}  // namespace imbsam
