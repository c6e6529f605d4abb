// The first touch of memory.
#pragma once

#include <stdint.h>

namespace gn {

// As gn_memory_populate, by advice, and by touch where the kernel does not know that.
void populate(char* begin, int64_t nbytes);

}  // namespace gn
