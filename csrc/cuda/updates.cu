// Which base's update is launched; the kernels are those of update.cuh.

#include "../imbsam.h"

namespace imbsam {
namespace cuda {

template <Base kBase>
void launch_update(const Table&, const UpdateLists&, const void* const* step,
                   const UpdateSettings&, const DeviceScalars&, const Stream&);

namespace {

template <int k = 0>
void launch(Base base, const Table& tensors, const UpdateLists& lists, const void* const* step,
            const UpdateSettings& settings, const DeviceScalars& at, const Stream& stream) {
  if ((int)base == k) return launch_update<(Base)k>(tensors, lists, step, settings, at, stream);
  if constexpr (k + 1 < kBaseCount) launch<k + 1>(base, tensors, lists, step, settings, at, stream);
}

}  // namespace

void update_(Base base, const Table& tensors, const UpdateLists& lists, const void* const* step,
             const UpdateSettings& settings, const DeviceScalars& at, const Stream& stream) {
  launch(base, tensors, lists, step, settings, at, stream);
}

}  // namespace cuda
}  // namespace imbsam
