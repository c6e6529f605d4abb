// Linux native AIO backend, on raw system calls (io_setup(2), io_submit(2), io_getevents(2)).
//
// Truly asynchronous for O_DIRECT only: through the page cache io_submit does the work itself, which
// holds up the engine's service thread but no caller.
#include <errno.h>

#include "io_backend.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/aio_abi.h>)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#if defined(__NR_io_setup) && defined(__NR_io_submit) && defined(__NR_io_getevents)
#define GN_HAVE_AIO 1
#endif
#endif
#endif

#ifdef GN_HAVE_AIO

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace gn::io {
namespace {

class AioBackend final : public Backend {
  public:
    AioBackend(int32_t queue_depth, int event_fd)
        : event_fd_(event_fd),
          blocks_(static_cast<size_t>(queue_depth)),
          pointers_(static_cast<size_t>(queue_depth)),
          events_(static_cast<size_t>(queue_depth)) {}

    ~AioBackend() override {
        if (context_ != 0) syscall(__NR_io_destroy, context_);
    }

    int32_t open() {
        if (syscall(__NR_io_setup, static_cast<unsigned>(blocks_.size()), &context_) < 0) {
            context_ = 0;
            return -errno;
        }
        return 0;
    }

    int32_t submit(Transfer* const* transfers, int32_t count) override {
        // The kernel copies a block while submitting it, so that the blocks are free again afterwards.
        const size_t num_filled = std::min(static_cast<size_t>(count), blocks_.size());
        for (size_t i = 0; i < num_filled; ++i) {
            fill(&blocks_[i], transfers[i]);
            pointers_[i] = &blocks_[i];
        }
        long rc = syscall(__NR_io_submit, context_, static_cast<long>(num_filled), pointers_.data());
        if (rc < 0) return -errno;
        return rc == 0 ? -EAGAIN : static_cast<int32_t>(rc);
    }

    int32_t reap(Transfer** finished, int32_t capacity) override {
        struct timespec no_wait = {0, 0};
        const long max_events = std::min(static_cast<long>(capacity), static_cast<long>(events_.size()));
        long rc;
        do {
            rc = syscall(__NR_io_getevents, context_, 0L, max_events, events_.data(), &no_wait);
        } while (rc < 0 && errno == EINTR);
        for (long i = 0; i < rc; ++i) {
            const struct io_event& event = events_[static_cast<size_t>(i)];
            auto* transfer = reinterpret_cast<Transfer*>(static_cast<uintptr_t>(event.data));
            transfer->result = event.res;
            finished[i] = transfer;
        }
        return rc < 0 ? 0 : static_cast<int32_t>(rc);
    }

  private:
    void fill(struct iocb* block, Transfer* transfer) const {
        std::memset(block, 0, sizeof(*block));
        block->aio_data = reinterpret_cast<uintptr_t>(transfer);
        block->aio_lio_opcode = transfer->is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        block->aio_fildes = static_cast<uint32_t>(transfer->fd);
        block->aio_buf = reinterpret_cast<uintptr_t>(transfer->buffer);
        block->aio_nbytes = static_cast<uint64_t>(transfer->nbytes);
        block->aio_offset = transfer->offset;
        block->aio_flags = IOCB_FLAG_RESFD;
        block->aio_resfd = static_cast<uint32_t>(event_fd_);
    }

    int event_fd_;
    aio_context_t context_ = 0;
    std::vector<struct iocb> blocks_;
    std::vector<struct iocb*> pointers_;
    std::vector<struct io_event> events_;
};

}  // namespace

int32_t make_aio_backend(std::unique_ptr<Backend>* backend, int32_t queue_depth, int event_fd) {
    auto aio = std::make_unique<AioBackend>(queue_depth, event_fd);
    const int32_t status = aio->open();
    if (status != 0) return status;
    *backend = std::move(aio);
    return 0;
}

}  // namespace gn::io

#else

namespace gn::io {

int32_t make_aio_backend(std::unique_ptr<Backend>*, int32_t, int) { return -ENOSYS; }

}  // namespace gn::io

#endif
