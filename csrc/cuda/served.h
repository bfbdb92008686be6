// Which devices a build serves: plain C++, so that it is tested without a GPU.
#pragma once

#include <stdlib.h>

#include <string>
#include <vector>

namespace imbsam {
namespace cuda {

inline std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

inline std::string capability(int number) {
  return std::to_string(number / 10) + "." + std::to_string(number % 10);
}

// What a build holds, in CMake's notation: 75-real is machine code, 75-virtual PTX, 75 both; 90a is
// for that very device. Names such as native or all tell nothing.
struct Built {
  std::string architectures;  // with commas between them
  int toolkit;                // 12080 for CUDA 12.8

  // A compute capability times ten, and what of it there is.
  struct Entry {
    int number;
    bool machine_code, ptx, exact;
  };

  std::vector<Entry> entries() const {
    std::vector<Entry> found;
    for (size_t at = 0; at < architectures.size();) {
      const size_t end = architectures.find(',', at);
      const std::string name = architectures.substr(at, end - at);
      at = end == std::string::npos ? architectures.size() : end + 1;
      const size_t digits = name.find_first_not_of("0123456789");
      const bool real = name.find("-real") != std::string::npos;
      const bool ptx = name.find("-virtual") != std::string::npos;
      if (digits != 0)
        found.push_back({atoi(name.c_str()), !ptx, !real,
                         digits < name.size() && name[digits] != '-'});
    }
    return found;
  }
};

// Systems on a chip run machine code for themselves alone.
inline bool is_tegra(int capability) {
  return capability == 72 || capability == 87 || capability == 101 || capability == 110;
}

// Empty where the build runs on a device of this capability under this driver, else why not.
inline std::string reason_not_served(const Built& built, int device, int driver) {
  const std::vector<Built::Entry> entries = built.entries();
  bool by_ptx = false;
  for (const Built::Entry& e : entries) {
    const bool same_code = e.number == device || (!e.exact && !is_tegra(device) &&
                                                  e.number / 10 == device / 10 &&
                                                  e.number <= device);
    if (e.machine_code && same_code) return "";
    by_ptx = by_ptx || (e.ptx && !e.exact && e.number <= device);
  }
  if (entries.empty() || (by_ptx && driver >= built.toolkit)) return "";
  if (by_ptx)
    return "it needs the PTX of this build, which takes a driver for CUDA " +
           version(built.toolkit) + " or newer, this one is for " + version(driver);
  return "this build is for " + built.architectures;
}

}  // namespace cuda
}  // namespace imbsam
