// A CUDA runtime with devices, in place of the real one, for what runtime.cu makes of them.
//
// FAKE_VERSION   of the driver
// FAKE_DEVICES   compute capabilities times ten, with commas between them, as 90,75
// FAKE_ERROR     what cudaDeviceGetAttribute returns, 0 by default

#include <cuda_runtime_api.h>
#include <stdlib.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<int> devices() {
  std::vector<int> found;
  std::istringstream text(getenv("FAKE_DEVICES"));
  for (std::string one; std::getline(text, one, ',');) found.push_back(std::stoi(one));
  return found;
}

}  // namespace

extern "C" {

cudaError_t cudaDriverGetVersion(int* version) {
  *version = atoi(getenv("FAKE_VERSION"));
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = (int)devices().size();
  return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const int capability = devices().at(device);
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  const char* error = getenv("FAKE_ERROR");
  return (cudaError_t)(error ? atoi(error) : 0);
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
}
