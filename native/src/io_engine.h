// Internal: the I/O engine and its requests.
#ifndef GEMINI_IO_ENGINE_H
#define GEMINI_IO_ENGINE_H

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../include/gemini_native.h"
#include "c_api.h"
#include "io_backend.h"
#include "io_files.h"
#include "spans.h"

namespace gn::io {

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
    gn::io::FileTable files_;
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

#endif  // GEMINI_IO_ENGINE_H
