// Where the pages of a mapping lie on a machine with several memory nodes.
#include <errno.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemini_native.h"

namespace {

constexpr int32_t kMaxNodes = 1024;
constexpr int32_t kBitsPerWord = 8 * sizeof(unsigned long);
constexpr int kInterleave = 3;  // MPOL_INTERLEAVE of linux/mempolicy.h, which not every system has installed

}  // namespace

int32_t gn_memory_interleave(void* address, int64_t nbytes, const int32_t* nodes, int32_t num_nodes) {
    if (nbytes < 0 || (nbytes > 0 && !address) || num_nodes < 1 || !nodes) return -EINVAL;
    unsigned long mask[kMaxNodes / kBitsPerWord] = {};
    for (int32_t i = 0; i < num_nodes; ++i) {
        if (nodes[i] < 0 || nodes[i] >= kMaxNodes) return -EINVAL;
        mask[nodes[i] / kBitsPerWord] |= 1ul << (nodes[i] % kBitsPerWord);
    }
    if (nbytes == 0) return 0;
#if defined(__linux__) && defined(SYS_mbind)
    // The kernel takes the length of the mask less one.
    const long status = syscall(SYS_mbind, address, static_cast<unsigned long>(nbytes), kInterleave, mask,
                                static_cast<unsigned long>(kMaxNodes) + 1, 0u);
    return status == 0 ? 0 : -errno;
#else
    return -ENOSYS;
#endif
}
