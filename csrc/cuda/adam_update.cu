// adam_update_, Adam and AdamW: compiled without fused multiply-add, for the bits of the CPU kernels.

#include "update.cuh"

namespace imbsam {
namespace cuda {

template void launch_update<Base::adam>(const Table&, const UpdateLists&, const void* const*,
                                        const UpdateSettings&, const DeviceScalars&,
                                        const Stream&);

}  // namespace cuda
}  // namespace imbsam
