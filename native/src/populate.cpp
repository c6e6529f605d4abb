// The first touch of memory: the kernel finds and clears a page for every one that is written to.
#include "populate.h"

#include <errno.h>
#include <sys/mman.h>

#include "gemini_native.h"

namespace {

constexpr int64_t kPageNbytes = 4096;
// Of Linux's <sys/mman.h>, from 5.14 on; older C libraries have no name for it.
constexpr int kMadvisePopulateWrite = 23;

// Zero is exchanged for zero: a write to a page without memory, and no change of one that somebody has
// written to.
void touch(char* begin, int64_t nbytes) {
    for (int64_t offset = 0; offset < nbytes; offset += kPageNbytes) {
        char expected = 0;
        __atomic_compare_exchange_n(begin + offset, &expected, char{0}, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED);
    }
}

int32_t advise(char* begin, int64_t nbytes) {
    while (madvise(begin, static_cast<size_t>(nbytes), kMadvisePopulateWrite) != 0)
        if (errno != EINTR) return -errno;
    return 0;
}

}  // namespace

void gn::populate(char* begin, int64_t nbytes) {
    if (advise(begin, nbytes) == -EINVAL) touch(begin, nbytes);
}

int32_t gn_memory_populate(void* address, int64_t nbytes, int32_t way) {
    if (nbytes < 0 || (nbytes > 0 && !address)) return -EINVAL;
    if (way == GN_POPULATE_BY_ADVICE) return nbytes == 0 ? 0 : advise(static_cast<char*>(address), nbytes);
    if (way != GN_POPULATE_BY_TOUCH) return -EINVAL;
    touch(static_cast<char*>(address), nbytes);
    return 0;
}
