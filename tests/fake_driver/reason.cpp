// Prints what reason_unavailable says under the driver that the library path leads to. With
// arguments (architectures, toolkit, device, driver): what reason_not_served says.

#include <stdio.h>
#include <stdlib.h>

#include "cuda/served.h"
#include "imbsam.h"

int main(int count, char** arguments) {
  if (count == 5) {
    const imbsam::cuda::Built built = {arguments[1], atoi(arguments[2])};
    puts(reason_not_served(built, atoi(arguments[3]), atoi(arguments[4])).c_str());
    return 0;
  }
  const char* reason = imbsam::cuda::reason_unavailable();
  puts(reason ? reason : "");
  return 0;
}
