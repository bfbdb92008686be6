// rmsprop_update_: compiled without fused multiply-add, for the bits of the CPU kernels.

#include "update.cuh"

namespace imbsam {
namespace cuda {

template void launch_update<Base::rmsprop>(const Table&, const UpdateLists&, const void* const*,
                                           const UpdateSettings&, const DeviceScalars&,
                                           const Stream&);

}  // namespace cuda
}  // namespace imbsam
