// Asynchronous file I/O: files, tickets, splitting, continuation of short transfers, errors.
//
// [Note: one service thread]
// Callers only append to a queue and wake the service thread through an eventfd, which the backends
// also signal on completion. The service thread alone talks to the backend: it takes what the queue
// depth allows, submits it as one batch, collects what has finished and decides what becomes of it.
// A request has at most one transfer in the kernel at a time, so that `nbytes_done` is always a prefix.
//
// [Note: what a ticket costs]
// A request lives in `requests_` until it has completed; one that succeeded is then erased, one that
// failed stays until the engine is destroyed. An issued number that is absent therefore succeeded, and
// completing a request never allocates; room for spans is taken when somebody asks for them.
//
// [Note: verified files]
// The service thread alone uses a file's checksums, without the lock: one write is summed before it is
// submitted, while others are in the kernel; a read is compared when its last byte is here. The sums of a
// write that fails stay: what a torn write has left on the disk does not pass for either version.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../include/gemini_native.h"
#include "c_api.h"
#include "crc32c.h"
#include "io_backend.h"
#include "spans.h"

namespace gn::io {

struct SignalBlocker::Mask {
    sigset_t signals;
};

SignalBlocker::SignalBlocker() : previous_(new Mask) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous_->signals);
}

SignalBlocker::~SignalBlocker() { pthread_sigmask(SIG_SETMASK, &previous_->signals, nullptr); }

void signal_event(int event_fd) {
    const uint64_t one = 1;
    while (write(event_fd, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
}

namespace {

constexpr int64_t kAlignmentNbytes = 4096;
constexpr int64_t kMaxTransferNbytes = int64_t{1} << 30;
constexpr int32_t kMaxQueueDepth = 4096;
constexpr int32_t kMaxThreads = 1024;
constexpr int32_t kMaxRetries = 1000;  // of one transfer that makes no progress
constexpr long kBackoffNs = 1000 * 1000;

class FileDescriptor {
  public:
    FileDescriptor() = default;
    explicit FileDescriptor(int fd) : fd_(fd) {}
    FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
    FileDescriptor& operator=(FileDescriptor&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~FileDescriptor() {
        if (fd_ >= 0) close(fd_);
    }
    int get() const { return fd_; }

  private:
    int fd_ = -1;
};

struct File {
    FileDescriptor buffered;
    FileDescriptor direct;                      // -1: the file system refuses O_DIRECT or nobody asked for it
    int32_t flags = 0;                          // gn_io_open_flag
    bool is_direct = false;                     // cleared when the first direct transfer is refused
    int64_t num_users = 0;                      // requests not yet completed, and calls that use a descriptor
    std::unique_ptr<BlockChecksums> checksums;  // null: not verified
};

struct Request : Transfer {
    uint64_t ticket = 0;
    gn_io_request asked = {};
    File* file = nullptr;
    int64_t nbytes_done = 0;
    int32_t status = 0;
    int32_t num_retries = 0;
    int64_t begin_ns = 0;  // when it was first given to the kernel; 0: nobody asked
    bool is_waited_for = false;
    bool is_via_direct = false;      // its present transfer
    bool is_direct_refused = false;  // a direct transfer of it came back with -EINVAL
    bool is_summed = false;          // its checksums have been recorded
    bool is_complete = false;
    int64_t mismatch = -1;  // bytes before the first block that was read and differs; -1: none does

    bool must_be_summed() const { return is_write && !is_summed && file->checksums != nullptr; }
    bool must_be_compared() const {
        return !is_write && file->checksums != nullptr && result > 0 && nbytes_done + result == asked.nbytes;
    }
};

// Requests waiting for a place in the kernel, linked through Transfer::next.
class RequestQueue {
  public:
    bool is_empty() const { return first_ == nullptr; }
    void push_back(Request* request) {
        request->next = nullptr;
        (last_ == nullptr ? first_ : last_->next) = request;
        last_ = request;
    }
    void push_front(Request* request) {
        request->next = first_;
        first_ = request;
        if (last_ == nullptr) last_ = request;
    }
    Request* pop() {
        auto* request = static_cast<Request*>(first_);
        first_ = request->next;
        if (first_ == nullptr) last_ = nullptr;
        return request;
    }

  private:
    Transfer* first_ = nullptr;
    Transfer* last_ = nullptr;
};

int open_retrying(const char* path, int flags) {
    int fd;
    do {
        fd = open(path, flags | O_CLOEXEC, 0600);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

// Open a second, direct descriptor of the file that `buffered` is; -1 in *direct if that is refused.
int32_t open_direct(const char* path, int access, int buffered, FileDescriptor* direct) {
    struct stat first;
    if (fstat(buffered, &first) != 0) return -errno;
    if (!S_ISREG(first.st_mode) && !S_ISBLK(first.st_mode)) return 0;
    FileDescriptor opened(open_retrying(path, access | O_DIRECT));
    if (opened.get() < 0) return errno == EINVAL || errno == EOPNOTSUPP ? 0 : -errno;
    struct stat second;
    if (fstat(opened.get(), &second) != 0) return -errno;
    if (first.st_dev != second.st_dev || first.st_ino != second.st_ino) return -ESTALE;
    *direct = std::move(opened);
    return 0;
}

}  // namespace
}  // namespace gn::io

// The engine itself; global because the header names it.
struct gn_io {
  public:
    ~gn_io();

    int32_t start(int32_t backend, int32_t queue_depth, int32_t num_threads);
    int32_t open_file(const char* path, int32_t flags);
    int32_t is_direct(int32_t number);
    int32_t close_file(int32_t number);
    int32_t sync_file(int32_t number);
    int32_t verify_file(int32_t number, int64_t nbytes);
    int32_t submit(const gn_io_request* requests, int64_t count, uint64_t* tickets);
    int32_t wait(uint64_t ticket, int64_t timeout_ns, gn_io_result* result);
    void stats(int64_t* nbytes_read, int64_t* nbytes_written);
    int32_t keep_spans(int64_t capacity);
    int64_t take_spans(gn_span* spans, int64_t max_count);

    const gn::ForkGuard fork_guard;

  private:
    using Request = gn::io::Request;
    using Transfer = gn::io::Transfer;
    using File = gn::io::File;

    // All of these run on the service thread; those ending in _locked need mutex_.
    void serve();
    int32_t take_batch_locked();
    void aim_locked(Request* request);
    void sum_last(int32_t count);
    bool submit_batch(int32_t count);
    int32_t collect();
    void settle_locked(Request* request);
    void retry_locked(Request* request, int32_t status);
    void complete_locked(Request* request, int32_t status);
    void cancel_queued_locked();
    void wait_for_event(bool is_starved);

    File* find_file_locked(int32_t number);
    int32_t check_locked(const gn_io_request& request);
    Request* find_unfinished_or_failed_locked(uint64_t ticket);

    int32_t queue_depth_ = 0;
    gn::io::FileDescriptor event_;
    std::unique_ptr<gn::io::Backend> backend_;
    std::thread service_;
    std::vector<Transfer*> batch_;  // queue_depth_ long; the service thread's, like the next one
    bool must_back_off_ = false;    // a transfer came back with -EAGAIN

    std::mutex mutex_;  // guards everything below
    std::condition_variable request_completed_;
    std::condition_variable last_waiter_left_;
    std::map<int32_t, std::unique_ptr<File>> files_;
    int32_t next_file_ = 0;
    std::unordered_map<uint64_t, std::unique_ptr<Request>> requests_;  // see [Note: what a ticket costs]
    uint64_t next_ticket_ = 1;
    gn::io::RequestQueue queue_;
    int32_t num_in_flight_ = 0;
    int32_t num_waiters_ = 0;
    bool is_stopping_ = false;
    int64_t nbytes_read_ = 0;
    int64_t nbytes_written_ = 0;
    gn::SpanLog spans_;
};

namespace gn::io {
namespace {

int32_t make_backend(std::unique_ptr<Backend>* backend, int32_t kind, int32_t queue_depth,
                     int32_t num_threads, int event_fd) {
    switch (kind) {
        case GN_IO_URING:
            return make_uring_backend(backend, queue_depth, event_fd);
        case GN_IO_AIO:
            return make_aio_backend(backend, queue_depth, event_fd);
        case GN_IO_THREADS:
            return make_threads_backend(backend, num_threads, event_fd);
        default:
            return -EINVAL;
    }
}

}  // namespace
}  // namespace gn::io

// ---------------------------------------------------------------------- life cycle

int32_t gn_io::start(int32_t backend, int32_t queue_depth, int32_t num_threads) {
    queue_depth_ = queue_depth;
    batch_.resize(static_cast<size_t>(queue_depth));
    event_ = gn::io::FileDescriptor(eventfd(0, EFD_CLOEXEC));
    if (event_.get() < 0) return -errno;
    const int32_t status = gn::io::make_backend(&backend_, backend, queue_depth, num_threads, event_.get());
    if (status != 0) return status;
    gn::io::SignalBlocker blocker;
    service_ = std::thread([this] { serve(); });
    return 0;
}

gn_io::~gn_io() {
    if (!service_.joinable()) return;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_stopping_ = true;
    }
    gn::io::signal_event(event_.get());
    service_.join();
    std::unique_lock<std::mutex> lock(mutex_);
    last_waiter_left_.wait(lock, [this] { return num_waiters_ == 0; });
}

// ---------------------------------------------------------------------- files

int32_t gn_io::open_file(const char* path, int32_t flags) {
    const bool can_read = (flags & GN_IO_OPEN_READ) != 0;
    const bool can_write = (flags & GN_IO_OPEN_WRITE) != 0;
    const int access = can_read ? (can_write ? O_RDWR : O_RDONLY) : O_WRONLY;
    int how = access;
    if ((flags & GN_IO_OPEN_CREATE) != 0) how |= O_CREAT;
    if ((flags & GN_IO_OPEN_TRUNCATE) != 0) how |= O_TRUNC;

    auto file = std::make_unique<File>();
    file->flags = flags;
    file->buffered = gn::io::FileDescriptor(gn::io::open_retrying(path, how));
    if (file->buffered.get() < 0) return -errno;
    if ((flags & GN_IO_OPEN_DIRECT) != 0) {
        const int32_t status = gn::io::open_direct(path, access, file->buffered.get(), &file->direct);
        if (status != 0) return status;
        file->is_direct = file->direct.get() >= 0;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (next_file_ == INT32_MAX) return -EMFILE;
    files_.emplace(next_file_, std::move(file));
    return next_file_++;
}

gn::io::File* gn_io::find_file_locked(int32_t number) {
    auto found = files_.find(number);
    return found == files_.end() ? nullptr : found->second.get();
}

int32_t gn_io::is_direct(int32_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const File* file = find_file_locked(number);
    if (file == nullptr) return -EBADF;
    return file->is_direct ? 1 : 0;
}

int32_t gn_io::close_file(int32_t number) {
    std::unique_ptr<File> closing;  // closed after the lock is gone
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = files_.find(number);
    if (found == files_.end()) return -EBADF;
    if (found->second->num_users > 0) return -EBUSY;
    closing = std::move(found->second);
    files_.erase(found);
    return 0;
}

int32_t gn_io::sync_file(int32_t number) {
    File* file;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        file = find_file_locked(number);
        if (file == nullptr) return -EBADF;
        ++file->num_users;
    }
    int rc;
    do {
        rc = fdatasync(file->buffered.get());
    } while (rc != 0 && errno == EINTR);
    const int32_t status = rc == 0 ? 0 : -errno;
    std::lock_guard<std::mutex> lock(mutex_);
    --file->num_users;
    return status;
}

int32_t gn_io::verify_file(int32_t number, int64_t nbytes) {
    using gn::BlockChecksums;
    auto checksums = std::make_unique<BlockChecksums>(nbytes / BlockChecksums::kBlockNbytes);
    std::lock_guard<std::mutex> lock(mutex_);
    File* file = find_file_locked(number);
    if (file == nullptr) return -EBADF;
    if (file->num_users > 0) return -EBUSY;
    std::swap(file->checksums, checksums);
    return 0;
}

// ---------------------------------------------------------------------- callers' side

int32_t gn_io::check_locked(const gn_io_request& request) {
    const File* file = find_file_locked(request.file);
    if (file == nullptr) return -EBADF;
    if (request.op != GN_IO_READ && request.op != GN_IO_WRITE) return -EINVAL;
    const int32_t needed = request.op == GN_IO_READ ? GN_IO_OPEN_READ : GN_IO_OPEN_WRITE;
    if ((file->flags & needed) == 0) return -EBADF;
    if (request.nbytes < 0 || request.offset < 0 || request.nbytes > INT64_MAX - request.offset)
        return -EINVAL;
    if (request.buffer == nullptr && request.nbytes > 0) return -EINVAL;
    return 0;
}

int32_t gn_io::submit(const gn_io_request* requests, int64_t count, uint64_t* tickets) {
    std::vector<std::unique_ptr<Request>> fresh(static_cast<size_t>(count));
    for (auto& request : fresh) request = std::make_unique<Request>();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (is_stopping_) return -ECANCELED;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t status = check_locked(requests[i]);
            if (status != 0) return status;
        }
        requests_.reserve(requests_.size() + fresh.size());
        // From here on only the nodes of the table can run out of memory: undo them and nothing happened.
        int64_t num_stored = 0;
        try {
            for (; num_stored < count; ++num_stored) {
                const auto i = static_cast<size_t>(num_stored);
                fresh[i]->ticket = next_ticket_ + i;
                fresh[i]->asked = requests[i];
                requests_.emplace(next_ticket_ + i, nullptr);
            }
        } catch (const std::bad_alloc&) {
            for (int64_t i = 0; i < num_stored; ++i) requests_.erase(next_ticket_ + static_cast<uint64_t>(i));
            throw;
        }
        for (size_t i = 0; i < fresh.size(); ++i) {
            Request* request = fresh[i].get();
            tickets[i] = request->ticket;
            request->file = find_file_locked(request->asked.file);
            if (request->asked.nbytes == 0) {
                requests_.erase(request->ticket);
                continue;
            }
            ++request->file->num_users;
            requests_[request->ticket] = std::move(fresh[i]);
            queue_.push_back(request);
        }
        next_ticket_ += fresh.size();
        if (queue_.is_empty()) return 0;
    }
    gn::io::signal_event(event_.get());
    return 0;
}

gn::io::Request* gn_io::find_unfinished_or_failed_locked(uint64_t ticket) {
    auto found = requests_.find(ticket);
    return found == requests_.end() ? nullptr : found->second.get();
}

int32_t gn_io::wait(uint64_t ticket, int64_t timeout_ns, gn_io_result* result) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (ticket == 0 || ticket >= next_ticket_) return -EINVAL;
    auto is_complete = [this, ticket] {
        const Request* request = find_unfinished_or_failed_locked(ticket);
        return request == nullptr || request->is_complete;
    };
    if (!is_complete()) {
        if (timeout_ns == 0) return -ETIMEDOUT;
        find_unfinished_or_failed_locked(ticket)->is_waited_for = true;
        ++num_waiters_;
        const bool in_time = gn::wait_until(&request_completed_, &lock, timeout_ns, is_complete);
        if (--num_waiters_ == 0 && is_stopping_) last_waiter_left_.notify_all();
        if (!in_time) return -ETIMEDOUT;
    }
    const Request* failed = find_unfinished_or_failed_locked(ticket);
    if (result != nullptr) {
        *result = {0, -1, -1, 0, 0, 0};  // of a success only the status is known by now
        if (failed != nullptr)
            *result = {failed->status,       failed->asked.file,   failed->asked.op,
                       failed->asked.offset, failed->asked.nbytes, failed->nbytes_done};
    }
    return failed == nullptr ? 0 : failed->status;
}

void gn_io::stats(int64_t* nbytes_read, int64_t* nbytes_written) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (nbytes_read != nullptr) *nbytes_read = nbytes_read_;
    if (nbytes_written != nullptr) *nbytes_written = nbytes_written_;
}

int32_t gn_io::keep_spans(int64_t capacity) {
    std::lock_guard<std::mutex> lock(mutex_);
    spans_.keep(capacity);
    return 0;
}

int64_t gn_io::take_spans(gn_span* spans, int64_t max_count) {
    std::lock_guard<std::mutex> lock(mutex_);
    return spans_.take(spans, max_count);
}

// ---------------------------------------------------------------------- service thread

void gn_io::serve() {
    for (;;) {
        int32_t num_taken;
        must_back_off_ = false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (is_stopping_) {
                cancel_queued_locked();
                if (num_in_flight_ == 0) return;
            }
            num_taken = take_batch_locked();
        }
        sum_last(num_taken);
        const bool is_starved = submit_batch(num_taken);
        const int32_t num_finished = collect();
        if (is_starved || (num_taken == 0 && num_finished == 0) || must_back_off_) wait_for_event(is_starved);
    }
}

// Fill batch_ with as many queued requests as the queue depth allows, up to the first that must be summed.
int32_t gn_io::take_batch_locked() {
    int32_t count = 0;
    while (!queue_.is_empty() && num_in_flight_ < queue_depth_) {
        Request* request = queue_.pop();
        aim_locked(request);
        if (request->begin_ns == 0 && spans_.is_on()) request->begin_ns = gn::now_ns();
        batch_[static_cast<size_t>(count++)] = request;
        ++num_in_flight_;
        if (request->must_be_summed()) break;
    }
    return count;
}

// Record the checksums of the last of a batch, if it is a write that needs them; see [Note: verified files].
void gn_io::sum_last(int32_t count) {
    if (count == 0) return;
    auto* request = static_cast<Request*>(batch_[static_cast<size_t>(count - 1)]);
    if (!request->must_be_summed()) return;
    const gn_io_request& asked = request->asked;
    request->file->checksums->record(static_cast<const char*>(asked.buffer), asked.nbytes, asked.offset);
    request->is_summed = true;
}

// Describe the next transfer of a request: what is left of it, through the descriptor that suits.
void gn_io::aim_locked(Request* request) {
    const gn_io_request& asked = request->asked;
    const File& file = *request->file;
    request->is_write = asked.op == GN_IO_WRITE;
    request->buffer = static_cast<char*>(asked.buffer) + request->nbytes_done;
    request->offset = asked.offset + request->nbytes_done;
    request->nbytes = std::min(asked.nbytes - request->nbytes_done, gn::io::kMaxTransferNbytes);
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(request->buffer) & 0xFFF);
    const int64_t misaligned = (address | request->offset | request->nbytes) % gn::io::kAlignmentNbytes;
    request->is_via_direct = file.is_direct && !request->is_direct_refused && misaligned == 0;
    request->fd = request->is_via_direct ? file.direct.get() : file.buffered.get();
}

// Give the first `count` of batch_ to the backend. True: it can take no more now; the rest is queued again.
bool gn_io::submit_batch(int32_t count) {
    int32_t position = 0;
    while (position < count) {
        const int32_t taken = backend_->submit(&batch_[static_cast<size_t>(position)], count - position);
        if (taken > 0) {
            position += taken;
        } else if (taken == -EAGAIN) {
            break;
        } else if (taken != -EINTR) {
            std::lock_guard<std::mutex> lock(mutex_);
            auto* refused = static_cast<Request*>(batch_[static_cast<size_t>(position++)]);
            refused->result = taken;
            settle_locked(refused);
        }
    }
    if (position == count) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    for (int32_t i = count; i-- > position;) {
        queue_.push_front(static_cast<Request*>(batch_[static_cast<size_t>(i)]));
        --num_in_flight_;
    }
    return true;
}

// Take what has finished from the backend; returns how many.
int32_t gn_io::collect() {
    const int32_t count = backend_->reap(batch_.data(), queue_depth_);
    for (int32_t i = 0; i < count; ++i) {
        auto* request = static_cast<Request*>(batch_[static_cast<size_t>(i)]);
        const gn_io_request& asked = request->asked;
        if (request->must_be_compared())
            request->mismatch = request->file->checksums->find_mismatch(
                static_cast<const char*>(asked.buffer), asked.nbytes, asked.offset);
        std::lock_guard<std::mutex> lock(mutex_);
        settle_locked(request);
    }
    return count;
}

// Decide what becomes of a request whose transfer came back.
void gn_io::settle_locked(Request* request) {
    --num_in_flight_;
    const int64_t moved = request->result;
    if (moved == -EINVAL && request->is_via_direct) {
        request->is_direct_refused = true;
        queue_.push_front(request);
    } else if (moved == -EINTR || moved == -EAGAIN) {
        retry_locked(request, static_cast<int32_t>(moved));
    } else if (moved < 0) {
        complete_locked(request, static_cast<int32_t>(moved));
    } else if (moved == 0) {
        complete_locked(request, request->is_write ? -EIO : -ENODATA);
    } else {
        // Accepted at open but refused in use: some file systems do that.
        if (request->is_direct_refused) request->file->is_direct = false;
        request->num_retries = 0;
        request->nbytes_done += moved;
        (request->is_write ? nbytes_written_ : nbytes_read_) += moved;
        if (request->nbytes_done < request->asked.nbytes) {
            queue_.push_front(request);
        } else if (request->mismatch >= 0) {
            request->nbytes_done = request->mismatch;
            complete_locked(request, -EBADMSG);
        } else {
            complete_locked(request, 0);
        }
    }
}

void gn_io::retry_locked(Request* request, int32_t status) {
    if (++request->num_retries > gn::io::kMaxRetries) {
        complete_locked(request, status);
        return;
    }
    must_back_off_ = must_back_off_ || status == -EAGAIN;
    queue_.push_back(request);
}

// Wakes only who waits for this request: a caller with many in flight would otherwise wake at each.
void gn_io::complete_locked(Request* request, int32_t status) {
    --request->file->num_users;
    spans_.add(request->ticket, request->begin_ns);
    if (request->is_waited_for) request_completed_.notify_all();
    if (status == 0) {
        requests_.erase(request->ticket);
        return;
    }
    request->status = status;
    request->is_complete = true;
}

void gn_io::cancel_queued_locked() {
    while (!queue_.is_empty()) complete_locked(queue_.pop(), -ECANCELED);
}

// Sleep until something was submitted or has finished. The kernel being short of resources gives no
// event, so that a starved engine looks again after a pause.
void gn_io::wait_for_event(bool is_starved) {
    if (is_starved || must_back_off_) {
        const struct timespec pause = {0, gn::io::kBackoffNs};
        nanosleep(&pause, nullptr);
        return;
    }
    uint64_t num_events;
    while (read(event_.get(), &num_events, sizeof(num_events)) < 0 && errno == EINTR) {
    }
}

// ---------------------------------------------------------------------- the C interface

extern "C" {

int32_t gn_io_probe(int32_t backend) {
    return gn::guarded([=] {
        gn::io::FileDescriptor event(eventfd(0, EFD_CLOEXEC));
        if (event.get() < 0) return -errno;
        std::unique_ptr<gn::io::Backend> made;
        return gn::io::make_backend(&made, backend, 1, 1, event.get());
    });
}

int32_t gn_io_create(gn_io** io, int32_t backend, int32_t queue_depth, int32_t num_threads) {
    if (io == nullptr || queue_depth < 1 || queue_depth > gn::io::kMaxQueueDepth) return -EINVAL;
    if (backend == GN_IO_THREADS && (num_threads < 1 || num_threads > gn::io::kMaxThreads)) return -EINVAL;
    return gn::guarded([=] {
        auto engine = std::make_unique<gn_io>();
        const int32_t status = engine->start(backend, queue_depth, num_threads);
        if (status == 0) *io = engine.release();
        return status;
    });
}

int32_t gn_io_destroy(gn_io* io) {
    if (io == nullptr) return 0;
    return gn::guarded_on(io, [=] {
        delete io;
        return 0;
    });
}

int32_t gn_io_open(gn_io* io, const char* path, int32_t flags) {
    constexpr int32_t kAccess = GN_IO_OPEN_READ | GN_IO_OPEN_WRITE;
    constexpr int32_t kKnown = kAccess | GN_IO_OPEN_CREATE | GN_IO_OPEN_TRUNCATE | GN_IO_OPEN_DIRECT;
    if (path == nullptr || (flags & kAccess) == 0 || (flags & ~kKnown) != 0) return -EINVAL;
    return gn::guarded_on(io, [=] { return io->open_file(path, flags); });
}

int32_t gn_io_is_direct(gn_io* io, int32_t file) {
    return gn::guarded_on(io, [=] { return io->is_direct(file); });
}

int32_t gn_io_close(gn_io* io, int32_t file) {
    return gn::guarded_on(io, [=] { return io->close_file(file); });
}

int32_t gn_io_sync(gn_io* io, int32_t file) {
    return gn::guarded_on(io, [=] { return io->sync_file(file); });
}

int32_t gn_io_verify(gn_io* io, int32_t file, int64_t nbytes) {
    if (nbytes < 0) return -EINVAL;
    return gn::guarded_on(io, [=] { return io->verify_file(file, nbytes); });
}

int32_t gn_io_submit(gn_io* io, const gn_io_request* requests, int64_t count, uint64_t* tickets) {
    if (count < 0 || (count > 0 && (requests == nullptr || tickets == nullptr))) return -EINVAL;
    return gn::guarded_on(io, [=] { return io->submit(requests, count, tickets); });
}

int32_t gn_io_wait(gn_io* io, uint64_t ticket, int64_t timeout_ns, gn_io_result* result) {
    return gn::guarded_on(io, [=] { return io->wait(ticket, timeout_ns, result); });
}

int32_t gn_io_keep_spans(gn_io* io, int64_t capacity) {
    if (capacity < 0 || capacity > GN_MAX_SPANS) return -EINVAL;
    return gn::guarded_on(io, [=] { return io->keep_spans(capacity); });
}

int64_t gn_io_take_spans(gn_io* io, gn_span* spans, int64_t max_count) {
    if (max_count < 0 || (max_count > 0 && spans == nullptr)) return -EINVAL;
    return gn::guarded_on(io, [=] { return io->take_spans(spans, max_count); });
}

int32_t gn_io_stats(gn_io* io, int64_t* nbytes_read, int64_t* nbytes_written) {
    return gn::guarded_on(io, [=] {
        io->stats(nbytes_read, nbytes_written);
        return 0;
    });
}

}  // extern "C"
