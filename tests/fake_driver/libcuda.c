/* A driver that answers what the CUDA runtime asks first: its version, and whether there is a device.
   The runtime refuses to go on with a driver that is not NVIDIA's; runtime.cpp stands in from there.

   FAKE_VERSION   as cuDriverGetVersion says it, 12040 for CUDA 12.4
   FAKE_INIT      what cuInit returns: 100 for no device */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { kNotSupported = 801 };

int cuDriverGetVersion(int* version) {
  *version = atoi(getenv("FAKE_VERSION"));
  return 0;
}

int cuInit(unsigned flags) {
  (void)flags;
  return atoi(getenv("FAKE_INIT"));
}

static int not_supported(void) { return kNotSupported; }

int cuGetExportTable(const void** table, const void* id) {
  (void)id;
  *table = NULL;
  return kNotSupported;
}

int cuGetProcAddress(const char* name, void** address, int version, uint64_t flags);

int cuGetProcAddress_v2(const char* name, void** address, int version, uint64_t flags,
                        int* status) {
  static const struct {
    const char* name;
    void* address;
  } known[] = {
      {"cuDriverGetVersion", (void*)cuDriverGetVersion},
      {"cuGetExportTable", (void*)cuGetExportTable},
      {"cuGetProcAddress", (void*)cuGetProcAddress_v2},
      {"cuInit", (void*)cuInit},
  };
  (void)version;
  (void)flags;
  if (status) *status = 0;
  *address = (void*)not_supported;
  for (unsigned i = 0; i < sizeof(known) / sizeof(*known); ++i)
    if (!strcmp(known[i].name, name)) *address = known[i].address;
  return 0;
}

int cuGetProcAddress(const char* name, void** address, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, address, version, flags, NULL);
}
