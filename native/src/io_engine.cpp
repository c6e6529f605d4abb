// Asynchronous file I/O: tickets, splitting, continuation of short transfers, checksums, errors.
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
// completing a request never allocates; room for spans is taken when a caller asks for them.
//
// [Note: verified files]
// The service thread alone uses a file's checksums, without the lock: one write is summed before it is
// submitted, while others are in the kernel; a read is compared when its last byte is here. The sums of a
// write that fails stay: what a torn write has left on the disk does not pass for either version.
#include "io_engine.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <utility>

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
constexpr int32_t kMaxRetries = 1000;  // of one transfer that makes no progress
constexpr long kBackoffNs = 1000 * 1000;

}  // namespace

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
    std::unique_ptr<File> file;
    const int32_t status = gn::io::open_file(path, flags, &file);
    if (status != 0) return status;
    std::lock_guard<std::mutex> lock(mutex_);
    return files_.add(std::move(file));
}

int32_t gn_io::is_direct(int32_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const File* file = files_.find(number);
    if (file == nullptr) return -EBADF;
    return file->is_direct ? 1 : 0;
}

int32_t gn_io::close_file(int32_t number) {
    std::unique_ptr<File> closing;  // closed after the lock is gone
    std::lock_guard<std::mutex> lock(mutex_);
    return files_.remove(number, &closing);
}

int32_t gn_io::sync_file(int32_t number) {
    File* file;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        file = files_.find(number);
        if (file == nullptr) return -EBADF;
        ++file->num_users;
    }
    const int32_t status = gn::io::sync_file(*file);
    std::lock_guard<std::mutex> lock(mutex_);
    --file->num_users;
    return status;
}

int32_t gn_io::verify_file(int32_t number, int64_t nbytes) {
    using gn::BlockChecksums;
    auto checksums = std::make_unique<BlockChecksums>(nbytes / BlockChecksums::kBlockNbytes);
    std::lock_guard<std::mutex> lock(mutex_);
    File* file = files_.find(number);
    if (file == nullptr) return -EBADF;
    if (file->num_users > 0) return -EBUSY;
    std::swap(file->checksums, checksums);
    return 0;
}

// ---------------------------------------------------------------------- callers' side

int32_t gn_io::check_locked(const gn_io_request& request) {
    const File* file = files_.find(request.file);
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
            request->file = files_.find(request->asked.file);
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
