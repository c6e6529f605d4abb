// Memory that outlives the process: a file's pages, mapped so that they can be huge ones.
#include <errno.h>
#include <sys/mman.h>

#include "gemini_native.h"
#include "publish.h"

namespace {

constexpr int64_t kPageNbytes = 4096;
constexpr int64_t kHugePageNbytes = 2 * 1024 * 1024;
// Of Linux's <sys/mman.h>, from 6.1 on; older C libraries have no name for it.
constexpr int kMadviseCollapse = 25;

}  // namespace

int32_t gn_memory_map(int32_t descriptor, int64_t nbytes, void** address) {
    if (!address || nbytes <= 0 || nbytes % kPageNbytes != 0) return -EINVAL;
    // Pages of a file are huge only where its offsets and the addresses agree, which mmap(2) does not see to.
    const auto reserved_nbytes = static_cast<size_t>(nbytes + kHugePageNbytes);
    void* reserved = mmap(nullptr, reserved_nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) return -errno;
    char* const begin = static_cast<char*>(reserved);
    const auto skip = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(begin) % kHugePageNbytes);
    void* mapped = mmap(begin + skip, static_cast<size_t>(nbytes), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED, descriptor, 0);
    if (mapped == MAP_FAILED) {
        const int32_t status = -errno;
        munmap(reserved, reserved_nbytes);
        return status;
    }
    if (skip > 0) munmap(begin, static_cast<size_t>(skip));
    munmap(begin + skip + nbytes, static_cast<size_t>(kHugePageNbytes - skip));
#if defined(MADV_HUGEPAGE)
    madvise(mapped, static_cast<size_t>(nbytes), MADV_HUGEPAGE);
    madvise(mapped, static_cast<size_t>(nbytes - nbytes % kHugePageNbytes), kMadviseCollapse);
#endif
    *address = mapped;
    return 0;
}

int32_t gn_memory_unmap(void* address, int64_t nbytes) {
    return munmap(address, static_cast<size_t>(nbytes)) == 0 ? 0 : -errno;
}

void gn_memory_publish(uint64_t* place, uint64_t value) { gn::publish(place, value); }

uint64_t gn_memory_load(const uint64_t* place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
