// The losses as Python calls them: addresses as integers, checked. A part of bindings.cpp.
#pragma once

#include <initializer_list>
#include <optional>
#include <utility>

#include "check.h"
#include "imbsam.h"
#include "lists.h"

namespace {

using namespace imbsam;

CrossEntropySettings checked(const char* op, int dtype, int64_t rows, int64_t classes,
                             int64_t row_stride, double label_smoothing, int64_t ignore_index,
                             std::initializer_list<std::pair<const char*, uintptr_t>> pointers) {
  IMBSAM_CHECK(dtype >= 0 && dtype <= 3, op << ": dtype is " << dtype << ", expected 0 to 3");
  IMBSAM_CHECK(rows >= 0 && classes > 0, op << ": logits is (" << rows << ", " << classes
                                            << "), expected (N, K) with K > 0");
  IMBSAM_CHECK(row_stride >= 0, op << ": row_stride is " << row_stride << ", expected >= 0");
  for (const auto& [name, address] : pointers)
    IMBSAM_CHECK(address || rows == 0, op << ": " << name << " is a null pointer");
  return {rows, classes, row_stride, label_smoothing, ignore_index};
}

void split_cross_entropy(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                         uintptr_t logits, uintptr_t targets, uintptr_t plain, uintptr_t sharp,
                         uintptr_t class_weight, double label_smoothing, int64_t ignore_index,
                         std::optional<double> batch_size, uintptr_t head, uintptr_t tail,
                         uintptr_t b, uintptr_t lse, int threads) {
  const auto settings =
      checked("split_cross_entropy", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"plain", plain}, {"sharp", sharp},
               {"head", head}, {"tail", tail}, {"b", b}, {"lse", lse}});
  cpu::split_cross_entropy((DType)dtype, settings, pointer(logits),
                           (const int64_t*)pointer(targets),
                           {pointer(plain), pointer(sharp), pointer(class_weight)},
                           batch_size.value_or(-1), pointer(head), pointer(tail), pointer(b),
                           pointer(lse), threads);
}

void split_cross_entropy_backward(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                  double grad_head, double grad_tail, uintptr_t logits,
                                  uintptr_t targets, uintptr_t lse, double b, uintptr_t plain,
                                  uintptr_t sharp, uintptr_t class_weight,
                                  double label_smoothing, int64_t ignore_index,
                                  uintptr_t grad_logits, int threads) {
  const auto settings =
      checked("split_cross_entropy_backward", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"lse", lse}, {"plain", plain},
               {"sharp", sharp}, {"grad_logits", grad_logits}});
  cpu::split_cross_entropy_backward((DType)dtype, settings, grad_head, grad_tail, pointer(logits),
                                    (const int64_t*)pointer(targets), pointer(lse), b,
                                    {pointer(plain), pointer(sharp), pointer(class_weight)},
                                    pointer(grad_logits), threads);
}

CrossEntropySettings checked_soft(
    const char* op, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
    int64_t q_stride, double label_smoothing,
    std::initializer_list<std::pair<const char*, uintptr_t>> pointers) {
  IMBSAM_CHECK(q_stride >= 0, op << ": q_stride is " << q_stride << ", expected >= 0");
  return checked(op, dtype, rows, classes, row_stride, label_smoothing, 0, pointers);
}

void split_soft_cross_entropy(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                              uintptr_t logits, uintptr_t q, int64_t q_stride, uintptr_t plain,
                              uintptr_t sharp, uintptr_t class_weight, double label_smoothing,
                              std::optional<double> batch_size, uintptr_t head, uintptr_t tail,
                              uintptr_t b, uintptr_t row_numbers, int threads) {
  const auto settings =
      checked_soft("split_soft_cross_entropy", dtype, rows, classes, row_stride, q_stride,
                   label_smoothing,
                   {{"logits", logits}, {"q", q}, {"plain", plain}, {"sharp", sharp},
                    {"row_numbers", row_numbers}});
  IMBSAM_CHECK(head && tail && b, "split_soft_cross_entropy: head, tail or b is a null pointer");
  cpu::split_soft_cross_entropy((DType)dtype, settings, pointer(logits), pointer(q), q_stride,
                                {pointer(plain), pointer(sharp), pointer(class_weight)},
                                batch_size.value_or(-1), pointer(head), pointer(tail), pointer(b),
                                pointer(row_numbers), threads);
}

void split_soft_cross_entropy_backward(int dtype, int64_t rows, int64_t classes,
                                       int64_t row_stride, double grad_head, double grad_tail,
                                       uintptr_t logits, uintptr_t q, int64_t q_stride,
                                       uintptr_t row_numbers, double b, uintptr_t plain,
                                       uintptr_t sharp, uintptr_t class_weight,
                                       double label_smoothing, uintptr_t grad_logits,
                                       int threads) {
  const auto settings =
      checked_soft("split_soft_cross_entropy_backward", dtype, rows, classes, row_stride, q_stride,
                   label_smoothing,
                   {{"logits", logits}, {"q", q}, {"row_numbers", row_numbers}, {"plain", plain},
                    {"sharp", sharp}, {"grad_logits", grad_logits}});
  cpu::split_soft_cross_entropy_backward(
      (DType)dtype, settings, grad_head, grad_tail, pointer(logits), pointer(q), q_stride,
      pointer(row_numbers), b, {pointer(plain), pointer(sharp), pointer(class_weight)},
      pointer(grad_logits), threads);
}

#if defined(IMBSAM_CUDA)

cuda::Stream on(int device, uintptr_t stream) { return {device, pointer(stream)}; }

void cuda_split_cross_entropy(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                              uintptr_t logits, uintptr_t targets, uintptr_t plain,
                              uintptr_t sharp, uintptr_t class_weight, double label_smoothing,
                              int64_t ignore_index, std::optional<double> batch_size,
                              uintptr_t losses, uintptr_t head, uintptr_t tail, uintptr_t b,
                              uintptr_t lse, int device, uintptr_t stream) {
  const auto settings =
      checked("split_cross_entropy", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"plain", plain}, {"sharp", sharp},
               {"losses", losses}, {"lse", lse}});
  IMBSAM_CHECK(head && tail && b, "split_cross_entropy: head, tail or b is a null pointer");
  cuda::split_cross_entropy((DType)dtype, settings, pointer(logits),
                            (const int64_t*)pointer(targets),
                            {pointer(plain), pointer(sharp), pointer(class_weight)},
                            batch_size.value_or(-1), (double*)pointer(losses), pointer(head),
                            pointer(tail), pointer(b), pointer(lse), on(device, stream));
}

void cuda_split_cross_entropy_backward(
    int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t grad_head,
    uintptr_t grad_tail, uintptr_t logits, uintptr_t targets, uintptr_t lse, uintptr_t b,
    uintptr_t plain, uintptr_t sharp, uintptr_t class_weight, uintptr_t weight_sum,
    double label_smoothing, int64_t ignore_index, uintptr_t grad_logits, int device,
    uintptr_t stream) {
  const auto settings =
      checked("split_cross_entropy_backward", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"lse", lse}, {"b", b},
               {"plain", plain}, {"sharp", sharp}, {"grad_logits", grad_logits}});
  cuda::split_cross_entropy_backward(
      (DType)dtype, settings, pointer(grad_head), pointer(grad_tail), pointer(logits),
      (const int64_t*)pointer(targets), pointer(lse), pointer(b),
      {pointer(plain), pointer(sharp), pointer(class_weight)}, (const double*)pointer(weight_sum),
      pointer(grad_logits), on(device, stream));
}

void cuda_split_soft_cross_entropy(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                   uintptr_t logits, uintptr_t q, int64_t q_stride,
                                   uintptr_t plain, uintptr_t sharp, uintptr_t class_weight,
                                   double label_smoothing, std::optional<double> batch_size,
                                   uintptr_t losses, uintptr_t head, uintptr_t tail, uintptr_t b,
                                   uintptr_t row_numbers, int device, uintptr_t stream) {
  const auto settings =
      checked_soft("split_soft_cross_entropy", dtype, rows, classes, row_stride, q_stride,
                   label_smoothing,
                   {{"logits", logits}, {"q", q}, {"plain", plain}, {"sharp", sharp},
                    {"losses", losses}, {"row_numbers", row_numbers}});
  IMBSAM_CHECK(head && tail && b, "split_soft_cross_entropy: head, tail or b is a null pointer");
  cuda::split_soft_cross_entropy((DType)dtype, settings, pointer(logits), pointer(q), q_stride,
                                 {pointer(plain), pointer(sharp), pointer(class_weight)},
                                 batch_size.value_or(-1), (double*)pointer(losses), pointer(head),
                                 pointer(tail), pointer(b), pointer(row_numbers),
                                 on(device, stream));
}

void cuda_split_soft_cross_entropy_backward(
    int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t grad_head,
    uintptr_t grad_tail, uintptr_t logits, uintptr_t q, int64_t q_stride, uintptr_t row_numbers,
    uintptr_t b, uintptr_t plain, uintptr_t sharp, uintptr_t class_weight, uintptr_t weight_sum,
    double label_smoothing, uintptr_t grad_logits, int device, uintptr_t stream) {
  const auto settings =
      checked_soft("split_soft_cross_entropy_backward", dtype, rows, classes, row_stride, q_stride,
                   label_smoothing,
                   {{"logits", logits}, {"q", q}, {"row_numbers", row_numbers}, {"b", b},
                    {"plain", plain}, {"sharp", sharp}, {"grad_logits", grad_logits}});
  cuda::split_soft_cross_entropy_backward(
      (DType)dtype, settings, pointer(grad_head), pointer(grad_tail), pointer(logits), pointer(q),
      q_stride, pointer(row_numbers), pointer(b),
      {pointer(plain), pointer(sharp), pointer(class_weight)}, (const double*)pointer(weight_sum),
      pointer(grad_logits), on(device, stream));
}

#endif

}  // namespace
