// Internal: times of jobs and requests, kept until they are taken. Guarded by: the owner's mutex.
#ifndef GEMINI_SPANS_H
#define GEMINI_SPANS_H

#include <stdint.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "../include/gemini_native.h"

namespace gn {

// On Linux the clock of Python's time.perf_counter_ns.
inline int64_t now_ns() {
    const auto since_boot = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(since_boot).count();
}

class SpanLog {
  public:
    bool is_on() const { return capacity_ > 0; }

    void keep(int64_t capacity) {
        spans_.clear();
        spans_.reserve(static_cast<size_t>(capacity));
        capacity_ = static_cast<size_t>(capacity);
    }

    // What began before the log was switched on has begin_ns 0 and is left out.
    void add(uint64_t ticket, int64_t begin_ns) {
        if (begin_ns > 0 && spans_.size() < capacity_) spans_.push_back({ticket, begin_ns, now_ns()});
    }

    int64_t take(gn_span* spans, int64_t max_count) {
        const auto end = spans_.begin() + std::min(max_count, static_cast<int64_t>(spans_.size()));
        std::copy(spans_.begin(), end, spans);
        const int64_t count = end - spans_.begin();
        spans_.erase(spans_.begin(), end);
        return count;
    }

  private:
    std::vector<gn_span> spans_;
    size_t capacity_ = 0;
};

}  // namespace gn

#endif  // GEMINI_SPANS_H
