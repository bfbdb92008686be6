// Whether this build can run on the machine's GPUs. Asks the driver only, so that no memory is
// taken on a device that is not used.

#include "launch.h"
#include "served.h"

namespace imbsam {
namespace cuda {
namespace {

const Built kBuilt = {IMBSAM_CUDA_ARCHITECTURES, CUDART_VERSION};

int capability_of(int device) {
  int major = 0, minor = 0;
  check("cuda", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("cuda", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

std::string reason() {
  constexpr int kDriver = 12010;  // from there on, kernels take 32,764 bytes of arguments
  int driver = 0, devices = 0;
  check("cuda", cudaDriverGetVersion(&driver));
  if (driver == 0) return "no NVIDIA driver was found";
  if (driver < kDriver)
    return "the NVIDIA driver is for CUDA " + version(driver) + ", expected " + version(kDriver) +
           " or newer";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string(cudaGetErrorString(error)) + " (built with CUDA " +
           version(CUDART_VERSION) + ", driver for CUDA " + version(driver) + ")";
  }
  for (int device = 0; device < devices; ++device) {
    const std::string not_served = reason_not_served(kBuilt, capability_of(device), driver);
    if (!not_served.empty())
      return "device " + std::to_string(device) + " has compute capability " +
             capability(capability_of(device)) + ", " + not_served +
             " (hide the device with CUDA_VISIBLE_DEVICES)";
  }
  return "";
}

std::string reason_or_error() {
  try {
    return reason();
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

const char* reason_unavailable() {
  static const std::string found = reason_or_error();
  return found.empty() ? nullptr : found.c_str();
}

}  // namespace cuda
}  // namespace imbsam
