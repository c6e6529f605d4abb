// A CPU allocator for torch that keeps large blocks dense. Compiled on the user's machine against the torch
// found there (build.py), because c10::Allocator is a C++ interface without a stable binary form.
//
// Large blocks come from one reserved range of addresses: the lowest free span that is long enough serves a
// request (address-ordered first fit) and neighbouring free spans are joined, so blocks gather at the low
// end. Free pages are kept for reuse as long as all that is resident stays within what was alive at once
// lately, plus a slack; beyond that the highest are given back, before a new block can touch more. Everything
// else is torch's own c10::alloc_cpu, blocks larger than the machine's memory too, so that they fail as they
// do without the pool. One deleter serves both, because the range tells them apart.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <vector>

extern "C" {

/// A snapshot; all in bytes but the last two. `HeapStatistics` in __init__.py mirrors it.
struct gn_heap_statistics {
    uint64_t live_nbytes;           ///< in blocks that torch holds, rounding included
    uint64_t peak_live_nbytes;      ///< the most of it at any time
    uint64_t resident_nbytes;       ///< pages touched and not given back; an upper bound
    uint64_t peak_resident_nbytes;  ///< the most of it at any time
    uint64_t released_nbytes;       ///< given back to the system, all in all
    uint64_t num_live_blocks;
    uint64_t num_free_spans;
};
}

namespace {

constexpr size_t kPageNbytes = size_t{2} << 20;  // a huge page: the unit that is touched and given back
constexpr size_t kMinBlockNbytes = size_t{256}
                                   << 10;  // smaller blocks are malloc's, which wastes little on them
constexpr size_t kGrowthNbytes = size_t{32} << 20;  // by how much the usable part of the range grows at least
constexpr size_t kMinRangeNbytes = size_t{1} << 30;
constexpr size_t kMinSlackNbytes = size_t{32} << 20;  // smaller: more pages are given back and touched again
constexpr size_t kSlackDivisor = 16;    // the slack is this part of what was needed, if that is more
constexpr int64_t kWindowSeconds = 10;  // "lately": this window and the one before
constexpr size_t kAlignment = 64;       // torch's own

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// First-fit heap over a reserved range. Offsets are relative to its begin. Callers hold the lock.
class Heap {
  public:
    /// Reserve addresses, four times the machine's memory if allowed; nothing is touched.
    /// Returns 0 or -ENOMEM.
    int reserve() {
        if (base_ != nullptr) return 0;
        machine_nbytes_ = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
        size_t nbytes = round_up(4 * machine_nbytes_, kPageNbytes);
        for (; nbytes >= kMinRangeNbytes; nbytes = round_up(nbytes / 2, kPageNbytes)) {
            void* range = mmap(nullptr, nbytes + kPageNbytes, PROT_NONE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (range == MAP_FAILED) continue;
            base_ = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(range), kPageNbytes));
            capacity_ = nbytes;
            madvise(base_, capacity_, MADV_HUGEPAGE);  // only advice: without it pages are small
            return 0;
        }
        return -ENOMEM;
    }

    bool owns(const void* data) const {
        const auto* byte = static_cast<const char*>(data);
        return byte >= base_ && byte < base_ + capacity_;
    }

    /// Return a block, or nullptr if the range or the system has no room, or if the machine's memory is
    /// smaller. The kernel does not check requests within the range (MAP_NORESERVE), but malloc's it refuses.
    void* allocate(size_t nbytes) {
        if (nbytes > std::min(capacity_, machine_nbytes_)) return nullptr;
        nbytes = round_up(nbytes, kAlignment);
        auto span =
            std::find_if(free_.begin(), free_.end(), [&](const auto& each) { return each.second >= nbytes; });
        if (span == free_.end()) {
            span = grow(nbytes);
            if (span == free_.end()) return nullptr;
        }
        const auto [offset, span_nbytes] = *span;
        live_.emplace(offset, nbytes);
        if (span_nbytes == nbytes) {
            free_.erase(span);
        } else {
            auto rest = free_.extract(span);
            rest.key() = offset + nbytes;
            rest.mapped() = span_nbytes - nbytes;
            free_.insert(std::move(rest));
        }
        stats_.live_nbytes += nbytes;
        stats_.peak_live_nbytes = std::max(stats_.peak_live_nbytes, stats_.live_nbytes);
        touch(offset, nbytes);
        give_back_excess();
        return base_ + offset;
    }

    /// Take a block back. Allocates nothing, so it cannot fail.
    void free(void* data) {
        auto block = live_.extract(size_t(static_cast<char*>(data) - base_));
        stats_.live_nbytes -= block.mapped();
        add_free(std::move(block));
        give_back_excess();
    }

    /// Give free pages back to the system, the highest first, until no more than `wanted` bytes are resident.
    void release(size_t wanted) {
        for (auto span = free_.rbegin(); span != free_.rend() && stats_.resident_nbytes > wanted; ++span) {
            const size_t first = (span->first + kPageNbytes - 1) / kPageNbytes;
            size_t page = (span->first + span->second) / kPageNbytes;
            while (page > first && stats_.resident_nbytes > wanted) {
                size_t end = page--;
                if (!is_touched_[page]) continue;
                while (page > first && is_touched_[page - 1] &&
                       stats_.resident_nbytes - (end - page) * kPageNbytes > wanted)
                    --page;
                give_back(page, end);
            }
        }
    }

    gn_heap_statistics statistics() const {
        gn_heap_statistics now = stats_;
        now.num_live_blocks = live_.size();
        now.num_free_spans = free_.size();
        return now;
    }

  private:
    using Spans = std::map<size_t, size_t>;  // offset -> bytes

    /// Make more of the range usable, so that its last span holds `nbytes`. Returns that span, or the end if
    /// it cannot.
    Spans::iterator grow(size_t nbytes) {
        const bool has_tail = !free_.empty() && free_.rbegin()->first + free_.rbegin()->second == usable_;
        const size_t missing = nbytes - (has_tail ? free_.rbegin()->second : 0);
        const size_t growth = std::min(round_up(missing, kGrowthNbytes), capacity_ - usable_);
        if (growth < missing || mprotect(base_ + usable_, growth, PROT_READ | PROT_WRITE) != 0)
            return free_.end();
        is_touched_.resize((usable_ + growth) / kPageNbytes);
        Spans added{{usable_, growth}};
        usable_ += growth;
        return add_free(added.extract(added.begin()));
    }

    /// Put a span among the free ones and join it with its neighbours.
    Spans::iterator add_free(Spans::node_type node) {
        auto span = free_.insert(std::move(node)).position;
        const auto next = std::next(span);
        if (next != free_.end() && span->first + span->second == next->first) {
            span->second += next->second;
            free_.erase(next);
        }
        if (span == free_.begin()) return span;
        const auto before = std::prev(span);
        if (before->first + before->second != span->first) return span;
        before->second += span->second;
        free_.erase(span);
        return before;
    }

    void touch(size_t offset, size_t nbytes) {
        for (size_t page = offset / kPageNbytes; page * kPageNbytes < offset + nbytes; ++page) {
            if (is_touched_[page]) continue;
            is_touched_[page] = true;
            stats_.resident_nbytes += kPageNbytes;
        }
    }

    void give_back_excess() {
        note_need();
        const size_t needed = std::max(needed_before_, needed_now_);
        release(needed + std::max(kMinSlackNbytes, needed / kSlackDivisor));
        stats_.peak_resident_nbytes = std::max(stats_.peak_resident_nbytes, stats_.resident_nbytes);
    }

    void give_back(size_t first_page, size_t end_page) {
        const size_t nbytes = (end_page - first_page) * kPageNbytes;
        if (madvise(base_ + first_page * kPageNbytes, nbytes, MADV_DONTNEED) != 0)
            return;  // locked by the user
        std::fill(is_touched_.begin() + first_page, is_touched_.begin() + end_page, false);
        stats_.resident_nbytes -= nbytes;
        stats_.released_nbytes += nbytes;
    }

    /// Remember the most that was alive in this window and the one before.
    void note_need() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
        if (time.tv_sec >= window_end_) {
            needed_before_ = time.tv_sec >= window_end_ + kWindowSeconds ? 0 : needed_now_;
            needed_now_ = 0;
            window_end_ = time.tv_sec + kWindowSeconds;
        }
        needed_now_ = std::max(needed_now_, size_t(stats_.live_nbytes));
    }

    char* base_ = nullptr;
    size_t capacity_ = 0;
    size_t machine_nbytes_ = 0;  // its physical memory
    size_t usable_ = 0;          // the part of the range that may be read and written; never shrinks
    Spans free_, live_;
    std::vector<bool> is_touched_;  // per huge page of the usable part
    size_t needed_now_ = 0, needed_before_ = 0;
    int64_t window_end_ = 0;
    gn_heap_statistics stats_{};
};

// Never destroyed: tensors outlive static destructors.
Heap& heap() {
    static Heap* const instance = new Heap;
    return *instance;
}

std::mutex& heap_mutex() {
    static std::mutex* const instance = new std::mutex;
    return *instance;
}

void free_block(void* data) {
    if (data == nullptr) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    if (!heap().owns(data)) return c10::free_cpu(data);
    const std::lock_guard<std::mutex> lock(heap_mutex());
    heap().free(data);
}

class PoolAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t nbytes) override {
        void* data = allocate_block(nbytes);
        c10::profiledCPUMemoryReporter().New(data, nbytes);
        return {data, data, &free_block, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &free_block; }

    void copy_data(void* dest, const void* src, std::size_t count) const override {
        default_copy_data(dest, src, count);
    }

  private:
    static void* allocate_block(size_t nbytes) {
        if (nbytes >= kMinBlockNbytes) {
            const std::lock_guard<std::mutex> lock(heap_mutex());
            if (void* data = heap().allocate(nbytes)) return data;
        }
        try {
            return c10::alloc_cpu(nbytes);
        } catch (const c10::Error&) {
            c10::profiledCPUMemoryReporter().OutOfMemory(nbytes);
            throw;
        }
    }
};

PoolAllocator& pool_allocator() {
    static PoolAllocator* const instance = new PoolAllocator;
    return *instance;
}

}  // namespace

#define GN_EXPORT extern "C" __attribute__((visibility("default")))

/// Serve torch's CPU memory from now on; live blocks are freed by the allocator that made them. Idempotent.
/// Not to be called while other threads allocate for the first time. Returns 0; -ENOMEM if no addresses can
/// be reserved; -EBUSY if someone else's allocator is in place, which is left there.
GN_EXPORT int gn_heap_install() {
    try {
        if (c10::GetCPUAllocator() == &pool_allocator()) return 0;
        if (c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator()) return -EBUSY;
        static const int forks = pthread_atfork([] { heap_mutex().lock(); }, [] { heap_mutex().unlock(); },
                                                [] { heap_mutex().unlock(); });
        if (forks != 0) return -ENOMEM;
        {
            const std::lock_guard<std::mutex> lock(heap_mutex());
            if (const int error = heap().reserve()) return error;
        }
        c10::SetCPUAllocator(&pool_allocator());
        return c10::GetCPUAllocator() == &pool_allocator() ? 0 : -EBUSY;
    } catch (...) {
        return -ENOMEM;
    }
}

/// Give torch its own allocator back. Live blocks stay valid and return to the heap when freed. Idempotent.
GN_EXPORT void gn_heap_uninstall() {
    if (c10::GetCPUAllocator() == &pool_allocator()) c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
}

/// Give every free page back to the system.
GN_EXPORT void gn_heap_release() {
    const std::lock_guard<std::mutex> lock(heap_mutex());
    heap().release(0);
}

/// Write a snapshot. Thread-safe.
GN_EXPORT void gn_heap_read_statistics(gn_heap_statistics* statistics) {
    const std::lock_guard<std::mutex> lock(heap_mutex());
    *statistics = heap().statistics();
}
