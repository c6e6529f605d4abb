// Backend of last resort: threads that call pread and pwrite.
#include <errno.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "io_backend.h"

namespace gn::io {
namespace {

class ThreadsBackend final : public Backend {
  public:
    explicit ThreadsBackend(int event_fd) : event_fd_(event_fd) {}

    ~ThreadsBackend() override {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            is_stopping_ = true;
        }
        work_arrived_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    void start(int32_t num_threads) {
        workers_.reserve(static_cast<size_t>(num_threads));
        SignalBlocker blocker;
        for (int32_t i = 0; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
    }

    int32_t submit(Transfer* const* transfers, int32_t count) override {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (int32_t i = 0; i < count; ++i) {
                transfers[i]->next = nullptr;
                (waiting_last_ == nullptr ? waiting_ : waiting_last_->next) = transfers[i];
                waiting_last_ = transfers[i];
            }
        }
        if (count == 1)
            work_arrived_.notify_one();
        else
            work_arrived_.notify_all();
        return count;
    }

    int32_t reap(Transfer** finished, int32_t capacity) override {
        std::lock_guard<std::mutex> lock(mutex_);
        int32_t count = 0;
        for (; finished_ != nullptr && count < capacity; ++count) {
            finished[count] = finished_;
            finished_ = finished_->next;
        }
        return count;
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_arrived_.wait(lock, [this] { return waiting_ != nullptr || is_stopping_; });
            if (waiting_ == nullptr) return;
            Transfer* transfer = waiting_;
            waiting_ = transfer->next;
            if (waiting_ == nullptr) waiting_last_ = nullptr;
            lock.unlock();
            transfer->result = move(*transfer);
            lock.lock();
            transfer->next = finished_;
            finished_ = transfer;
            lock.unlock();
            signal_event(event_fd_);
            lock.lock();
        }
    }

    static int64_t move(const Transfer& transfer) {
        const auto nbytes = static_cast<size_t>(transfer.nbytes);
        const auto offset = static_cast<off_t>(transfer.offset);
        ssize_t rc;
        do {
            rc = transfer.is_write ? pwrite(transfer.fd, transfer.buffer, nbytes, offset)
                                   : pread(transfer.fd, transfer.buffer, nbytes, offset);
        } while (rc < 0 && errno == EINTR);
        return rc < 0 ? -errno : rc;
    }

    int event_fd_;
    std::mutex mutex_;
    std::condition_variable work_arrived_;
    bool is_stopping_ = false;
    Transfer* waiting_ = nullptr;  // first in, first out
    Transfer* waiting_last_ = nullptr;
    Transfer* finished_ = nullptr;  // in any order
    std::vector<std::thread> workers_;
};

}  // namespace

int32_t make_threads_backend(std::unique_ptr<Backend>* backend, int32_t num_threads, int event_fd) {
    auto threads = std::make_unique<ThreadsBackend>(event_fd);
    threads->start(num_threads);
    *backend = std::move(threads);
    return 0;
}

}  // namespace gn::io
