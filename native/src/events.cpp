// Events between processes: words in shared memory that count signals, and the kernel's waits for them.
#include <errno.h>
#include <stdint.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

#include <climits>

#include "gemini_native.h"

namespace {

constexpr int64_t kNsPerSecond = 1000000000;

}  // namespace

uint32_t gn_event_load(const uint32_t* event) { return __atomic_load_n(event, __ATOMIC_ACQUIRE); }

#if defined(__linux__)

int32_t gn_event_signal(uint32_t* event) {
    __atomic_fetch_add(event, 1u, __ATOMIC_ACQ_REL);
    return syscall(SYS_futex, event, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0) < 0 ? -errno : 0;
}

int32_t gn_event_wait(const uint32_t* event, uint32_t seen, int64_t timeout_ns) {
    timespec timeout = {};
    timeout.tv_sec = static_cast<time_t>(timeout_ns / kNsPerSecond);
    timeout.tv_nsec = static_cast<long>(timeout_ns % kNsPerSecond);
    const timespec* limit = timeout_ns < 0 ? nullptr : &timeout;
    if (syscall(SYS_futex, event, FUTEX_WAIT, seen, limit, nullptr, 0) == 0) return 0;
    return errno == EAGAIN || errno == EINTR ? 0 : -errno;
}

#else

int32_t gn_event_signal(uint32_t*) { return -ENOSYS; }

int32_t gn_event_wait(const uint32_t*, uint32_t, int64_t) { return -ENOSYS; }

#endif
