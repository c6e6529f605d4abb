// io_uring backend, on raw system calls (see io_uring(7), io_uring_setup(2), io_uring_enter(2)).
//
// Uses only what Linux 5.2 has: vectored reads and writes and completion through an eventfd. The ring
// has a single user, the service thread, so that its own indices need no lock; those that the kernel
// writes are read with acquire, those that the kernel reads are written with release.
#include <errno.h>

#include "io_backend.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#if defined(__NR_io_uring_setup) && defined(__NR_io_uring_enter) && defined(__NR_io_uring_register)
#define GN_HAVE_URING 1
#endif
#endif
#endif

#ifdef GN_HAVE_URING

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace gn::io {
namespace {

// A mapping of ring memory; the child of a fork does not inherit it.
class Mapping {
  public:
    ~Mapping() {
        if (address_ != nullptr) munmap(address_, nbytes_);
    }
    Mapping() = default;
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    int32_t map(int ring_fd, size_t nbytes, uint64_t place) {
        void* address = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_fd,
                             static_cast<off_t>(place));
        if (address == MAP_FAILED) return -errno;
        address_ = address;
        nbytes_ = nbytes;
        madvise(address, nbytes, MADV_DONTFORK);
        return 0;
    }

    template <typename T>
    T* at(uint32_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(address_) + offset);
    }

  private:
    void* address_ = nullptr;
    size_t nbytes_ = 0;
};

class UringBackend final : public Backend {
  public:
    ~UringBackend() override {
        if (ring_fd_ >= 0) close(ring_fd_);
    }

    int32_t open(int32_t queue_depth, int event_fd) {
        struct io_uring_params params;
        std::memset(&params, 0, sizeof(params));
        long fd = syscall(__NR_io_uring_setup, static_cast<unsigned>(queue_depth), &params);
        if (fd < 0) return -errno;
        ring_fd_ = static_cast<int>(fd);
        int32_t status = map_rings(params);
        if (status != 0) return status;
        if (syscall(__NR_io_uring_register, ring_fd_, IORING_REGISTER_EVENTFD, &event_fd, 1) < 0)
            return -errno;
        return 0;
    }

    int32_t submit(Transfer* const* transfers, int32_t count) override {
        const uint32_t head = __atomic_load_n(submit_head_, __ATOMIC_ACQUIRE);
        const auto num_filled =
            static_cast<uint32_t>(std::min<int64_t>(count, static_cast<int64_t>(num_entries_)));
        for (uint32_t i = 0; i < num_filled; ++i) {
            const uint32_t slot = (head + i) & submit_mask_;
            fill(&entries_.at<struct io_uring_sqe>(0)[slot], transfers[i]);
            submit_slots_[slot] = slot;
        }
        // The queue is empty between calls: what the kernel does not consume now is taken back below.
        __atomic_store_n(submit_tail_, head + num_filled, __ATOMIC_RELEASE);
        long rc = syscall(__NR_io_uring_enter, ring_fd_, num_filled, 0U, 0U, nullptr, size_t{0});
        const int error = errno;
        const uint32_t consumed = __atomic_load_n(submit_head_, __ATOMIC_ACQUIRE) - head;
        __atomic_store_n(submit_tail_, head + consumed, __ATOMIC_RELEASE);
        if (consumed > 0) return static_cast<int32_t>(consumed);
        if (rc >= 0 || error == EBUSY) return -EAGAIN;
        return -error;
    }

    int32_t reap(Transfer** finished, int32_t capacity) override {
        uint32_t head = *complete_head_;
        const uint32_t tail = __atomic_load_n(complete_tail_, __ATOMIC_ACQUIRE);
        int32_t count = 0;
        for (; head != tail && count < capacity; ++head, ++count) {
            const struct io_uring_cqe& cqe = completions_[head & complete_mask_];
            auto* transfer = reinterpret_cast<Transfer*>(static_cast<uintptr_t>(cqe.user_data));
            transfer->result = cqe.res;
            finished[count] = transfer;
        }
        __atomic_store_n(complete_head_, head, __ATOMIC_RELEASE);
        return count;
    }

  private:
    int32_t map_rings(const struct io_uring_params& params) {
        const size_t submit_nbytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
        const size_t complete_nbytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
        const bool is_shared = (params.features & IORING_FEAT_SINGLE_MMAP) != 0;
        int32_t status =
            submit_ring_.map(ring_fd_, is_shared ? std::max(submit_nbytes, complete_nbytes) : submit_nbytes,
                             IORING_OFF_SQ_RING);
        if (status != 0) return status;
        if (!is_shared) {
            status = complete_ring_.map(ring_fd_, complete_nbytes, IORING_OFF_CQ_RING);
            if (status != 0) return status;
        }
        status = entries_.map(ring_fd_, params.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
        if (status != 0) return status;

        num_entries_ = params.sq_entries;
        submit_head_ = submit_ring_.at<uint32_t>(params.sq_off.head);
        submit_tail_ = submit_ring_.at<uint32_t>(params.sq_off.tail);
        submit_mask_ = *submit_ring_.at<uint32_t>(params.sq_off.ring_mask);
        submit_slots_ = submit_ring_.at<uint32_t>(params.sq_off.array);
        const Mapping& complete = is_shared ? submit_ring_ : complete_ring_;
        complete_head_ = complete.at<uint32_t>(params.cq_off.head);
        complete_tail_ = complete.at<uint32_t>(params.cq_off.tail);
        complete_mask_ = *complete.at<uint32_t>(params.cq_off.ring_mask);
        completions_ = complete.at<struct io_uring_cqe>(params.cq_off.cqes);
        return 0;
    }

    static void fill(struct io_uring_sqe* sqe, Transfer* transfer) {
        transfer->span.iov_base = transfer->buffer;
        transfer->span.iov_len = static_cast<size_t>(transfer->nbytes);
        std::memset(sqe, 0, sizeof(*sqe));
        sqe->opcode = transfer->is_write ? IORING_OP_WRITEV : IORING_OP_READV;
        sqe->fd = transfer->fd;
        sqe->addr = reinterpret_cast<uintptr_t>(&transfer->span);
        sqe->len = 1;
        sqe->off = static_cast<uint64_t>(transfer->offset);
        sqe->user_data = reinterpret_cast<uintptr_t>(transfer);
    }

    int ring_fd_ = -1;
    Mapping submit_ring_;
    Mapping complete_ring_;
    Mapping entries_;
    uint32_t num_entries_ = 0;
    uint32_t* submit_head_ = nullptr;
    uint32_t* submit_tail_ = nullptr;
    uint32_t submit_mask_ = 0;
    uint32_t* submit_slots_ = nullptr;
    uint32_t* complete_head_ = nullptr;
    uint32_t* complete_tail_ = nullptr;
    uint32_t complete_mask_ = 0;
    struct io_uring_cqe* completions_ = nullptr;
};

}  // namespace

int32_t make_uring_backend(std::unique_ptr<Backend>* backend, int32_t queue_depth, int event_fd) {
    auto uring = std::make_unique<UringBackend>();
    const int32_t status = uring->open(queue_depth, event_fd);
    if (status != 0) return status;
    *backend = std::move(uring);
    return 0;
}

}  // namespace gn::io

#else

namespace gn::io {

int32_t make_uring_backend(std::unique_ptr<Backend>*, int32_t, int) { return -ENOSYS; }

}  // namespace gn::io

#endif
