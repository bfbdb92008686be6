// A condition on a caller's input, with a message that the caller can act on.
#pragma once

#include <sstream>
#include <stdexcept>

#define IMBSAM_CHECK(condition, message)          \
  do {                                            \
    if (!(condition)) {                           \
      std::ostringstream text;                    \
      text << message;                            \
      throw std::invalid_argument(text.str());    \
    }                                             \
  } while (0)
