// Whether this build can run on the machine's current device.

#include "launch.h"

namespace imbsam {
namespace cuda {
namespace {

__global__ void probe() {}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string reason() {
  constexpr int kDriver = 12010;  // from there on, kernels take 32,764 bytes of arguments
  int driver = 0, devices = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) return "no NVIDIA driver was found";
  if (error == cudaSuccess && driver < kDriver)
    return "the NVIDIA driver is for CUDA " + version(driver) + ", expected " + version(kDriver) +
           " or newer";
  if (error == cudaSuccess) error = cudaGetDeviceCount(&devices);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(cudaGetErrorString(error)) + " (built with CUDA " + version(CUDART_VERSION) +
         ", driver for CUDA " + version(driver) + ")";
}

}  // namespace

const char* reason_unavailable() {
  static const std::string found = reason();
  return found.empty() ? nullptr : found.c_str();
}

}  // namespace cuda
}  // namespace imbsam
