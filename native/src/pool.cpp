// The worker pool: persistent threads that take blocks of the most urgent job.
#include <errno.h>
#include <string.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "c_api.h"
#include "float_mode.h"
#include "jobs.h"
#include "populate.h"
#include "spans.h"

namespace {

// One unit of work of a thread: long against the cost of taking it, short enough to spread a small job.
constexpr int64_t kBlockNumel = 16 * gn::kSumsqBlockNumel;
constexpr int64_t kBlockNbytes = 256 * 1024;
constexpr int64_t kPopulatedNbytes = 8 * 1024 * 1024;  // four huge pages, each of one thread alone
static_assert(kBlockNumel % GN_JOURNAL_BLOCK_NUMEL == 0, "threads share no block of a journal");

constexpr int32_t kMaxThreads = 4096;

struct Job {
    int32_t priority = 0;
    int64_t num_blocks = 0;
    int64_t num_taken = 0;     // blocks some thread has taken
    int64_t num_finished = 0;  // blocks that are done
    int64_t begin_ns = 0;      // when the first block was taken; 0: nobody asked
    bool is_cancelled = false;

    virtual ~Job() = default;
    virtual void run_block(int64_t block, int32_t worker) = 0;
    virtual void finish() {}  // called once, after the last block, by the thread that ran it
};

struct AdamJob : Job {
    gn_adam_args args;
    std::vector<gn_adam_segment> segments;
    const gn::Kernels* kernels;

    AdamJob(const gn_adam_args& source, const gn::Kernels* kernels)
        : args(source), segments(source.segments, source.segments + source.num_segments), kernels(kernels) {
        args.segments = segments.data();
        num_blocks = (args.numel + kBlockNumel - 1) / kBlockNumel;
    }
    void run_block(int64_t block, int32_t) override {
        const int64_t begin = block * kBlockNumel;
        gn::run_adam(*kernels, args, begin, std::min(args.numel, begin + kBlockNumel));
    }
};

struct JournalledAdamJob final : AdamJob {
    gn_adam_journal journal;

    JournalledAdamJob(const gn_adam_args& source, const gn_adam_journal& journal, const gn::Kernels* kernels)
        : AdamJob(source, kernels), journal(journal) {}
    void run_block(int64_t block, int32_t worker) override {
        const int64_t begin = block * kBlockNumel;
        gn::run_adam_journalled(*kernels, args, journal, worker, begin,
                                std::min(args.numel, begin + kBlockNumel));
    }
};

struct GradJob final : Job {
    gn_grad_args args;
    std::vector<double> block_sums;
    const gn::Kernels* kernels;

    GradJob(const gn_grad_args& source, const gn::Kernels* kernels) : args(source), kernels(kernels) {
        num_blocks = (args.numel + kBlockNumel - 1) / kBlockNumel;
        if (args.sumsq) block_sums.resize(static_cast<size_t>(gn::padded_count(num_leaves())));
    }
    int64_t num_leaves() const { return gn::num_sumsq_blocks(args.numel); }
    void run_block(int64_t block, int32_t) override {
        const int64_t begin = block * kBlockNumel;
        gn::run_grad(*kernels, args, begin, std::min(args.numel, begin + kBlockNumel),
                     args.sumsq ? block_sums.data() : nullptr);
    }
    void finish() override {
        if (args.sumsq) *args.sumsq = gn::reduce_block_sums(block_sums.data(), num_leaves());
    }
};

struct SumJob final : Job {
    gn_sum_args args;
    std::vector<const void*> parts;
    const gn::Kernels* kernels;

    SumJob(const gn_sum_args& source, const gn::Kernels* kernels)
        : args(source), parts(source.parts, source.parts + source.num_parts), kernels(kernels) {
        args.parts = parts.data();
        num_blocks = (args.numel + kBlockNumel - 1) / kBlockNumel;
    }
    void run_block(int64_t block, int32_t) override {
        const int64_t begin = block * kBlockNumel;
        gn::run_sum(*kernels, args, begin, std::min(args.numel, begin + kBlockNumel));
    }
};

struct CopyJob final : Job {
    char* dst;
    const char* src;
    int64_t nbytes;

    CopyJob(void* to, const void* from, int64_t count)
        : dst(static_cast<char*>(to)), src(static_cast<const char*>(from)), nbytes(count) {
        num_blocks = (nbytes + kBlockNbytes - 1) / kBlockNbytes;
    }
    void run_block(int64_t block, int32_t) override {
        const int64_t begin = block * kBlockNbytes;
        memcpy(dst + begin, src + begin, static_cast<size_t>(std::min(kBlockNbytes, nbytes - begin)));
    }
};

struct PopulateJob final : Job {
    char* begin;
    int64_t nbytes;

    PopulateJob(void* address, int64_t count) : begin(static_cast<char*>(address)), nbytes(count) {
        num_blocks = (nbytes + kPopulatedNbytes - 1) / kPopulatedNbytes;
    }
    void run_block(int64_t block, int32_t) override {
        const int64_t first = block * kPopulatedNbytes;
        gn::populate(begin + first, std::min(kPopulatedNbytes, nbytes - first));
    }
};

struct SweepJob final : Job {
    static constexpr int64_t kPiecesPerBlock = 256;

    std::vector<gn_sweep_buffer> buffers;
    uint64_t* checksum;
    int64_t num_pieces;
    std::atomic<uint64_t> sum{0};

    SweepJob(const gn_sweep_buffer* source, int64_t num_buffers, uint64_t* checksum)
        : buffers(source, source + num_buffers),
          checksum(checksum),
          num_pieces(gn::num_sweep_pieces(source, num_buffers)) {
        num_blocks = (num_pieces + kPiecesPerBlock - 1) / kPiecesPerBlock;
    }
    void run_block(int64_t block, int32_t) override {
        const int64_t begin = block * kPiecesPerBlock;
        const int64_t end = std::min(num_pieces, begin + kPiecesPerBlock);
        sum ^= gn::run_sweep(buffers.data(), static_cast<int64_t>(buffers.size()), begin, end);
    }
    void finish() override { *checksum = sum; }
};

bool is_background(const Job& job) { return job.priority >= GN_PRIORITY_BACKGROUND; }

int32_t current_thread_id() {
#if defined(__linux__)
    return static_cast<int32_t>(syscall(SYS_gettid));
#else
    return 0;
#endif
}

}  // namespace

// One mutex guards everything but the blocks' own work. Every job issued and not yet completed is in
// `pending`; those with untaken blocks are also in `queue`. A ticket below next_ticket that is not pending
// has completed without error, so completed jobs cost nothing. A job cannot fail once it is queued.
struct gn_pool {
    std::mutex mutex;
    std::condition_variable work_available;
    std::condition_variable progress;  // a job completed, or was cancelled, or a waiter left
    std::map<std::pair<int32_t, uint64_t>, Job*> queue;
    std::unordered_map<uint64_t, std::unique_ptr<Job>> pending;
    uint64_t next_ticket = 1;
    int64_t num_waiters = 0;
    bool is_shut_down = false;
    int32_t max_background = kMaxThreads;  // threads that may run background jobs at the same time
    int32_t num_background = 0;            // threads that do
    gn::SpanLog spans;
    std::vector<std::thread> threads;
    std::vector<int32_t> thread_ids;  // of the threads that have started, in the order they did
    const gn::ForkGuard fork_guard;

    bool can_start() const;
    void work();
    int32_t submit(std::unique_ptr<Job> job, int32_t priority, uint64_t* ticket);
    int32_t wait(uint64_t ticket, int64_t timeout_ns);
    void shut_down();
};

// The queue is in order of urgency: if its first job is in the background, so are all.
bool gn_pool::can_start() const {
    if (queue.empty()) return false;
    return is_shut_down || num_background < max_background || !is_background(*queue.begin()->second);
}

void gn_pool::work() {
    const gn::ScopedFloatMode float_mode;
    std::unique_lock<std::mutex> lock(mutex);
    const auto worker = static_cast<int32_t>(thread_ids.size());
    thread_ids.push_back(current_thread_id());
    progress.notify_all();
    for (;;) {
        work_available.wait(lock, [this] { return can_start() || (is_shut_down && queue.empty()); });
        if (queue.empty()) return;
        const auto first = queue.begin();
        Job* job = first->second;
        const uint64_t ticket = first->first.second;
        const int64_t block = job->num_taken++;
        if (block == 0 && spans.is_on()) job->begin_ns = gn::now_ns();
        if (job->num_taken == job->num_blocks) queue.erase(first);
        const int32_t background = is_background(*job) ? 1 : 0;
        num_background += background;
        lock.unlock();
        job->run_block(block, worker);
        lock.lock();
        num_background -= background;
        // This thread turns to something urgent, so another one may go on in the background.
        if (background && !queue.empty() && !is_background(*queue.begin()->second))
            work_available.notify_one();
        if (++job->num_finished < job->num_blocks) continue;
        lock.unlock();
        job->finish();
        lock.lock();
        // The job's memory is freed outside the lock, when no thread can find it any more.
        auto node = pending.extract(ticket);
        spans.add(ticket, job->begin_ns);
        progress.notify_all();
        lock.unlock();
        node = {};
        lock.lock();
    }
}

int32_t gn_pool::submit(std::unique_ptr<Job> job, int32_t priority, uint64_t* ticket) {
    Job* added = job.get();
    added->priority = priority;
    if (added->num_blocks == 0) added->finish();
    const std::lock_guard<std::mutex> guard(mutex);
    if (is_shut_down) return -ECANCELED;
    if (added->num_blocks > 0) {
        const auto entry = pending.emplace(next_ticket, std::move(job)).first;
        try {
            queue.emplace(std::make_pair(priority, next_ticket), added);
        } catch (const std::bad_alloc&) {
            pending.erase(entry);
            throw;
        }
        if (added->num_blocks > 1)
            work_available.notify_all();
        else
            work_available.notify_one();
    }
    *ticket = next_ticket++;
    return 0;
}

int32_t gn_pool::wait(uint64_t ticket, int64_t timeout_ns) {
    std::unique_lock<std::mutex> lock(mutex);
    if (ticket == 0 || ticket >= next_ticket) return -EINVAL;
    const auto is_settled = [this, ticket] {
        const auto entry = pending.find(ticket);
        return entry == pending.end() || entry->second->is_cancelled;
    };
    ++num_waiters;
    const bool in_time = gn::wait_until(&progress, &lock, timeout_ns, is_settled);
    const int32_t status = !in_time ? -ETIMEDOUT : pending.count(ticket) ? -ECANCELED : 0;
    --num_waiters;
    if (is_shut_down) progress.notify_all();
    return status;
}

void gn_pool::shut_down() {
    {
        const std::lock_guard<std::mutex> guard(mutex);
        is_shut_down = true;
        for (auto entry = queue.begin(); entry != queue.end();) {
            Job* job = entry->second;
            if (job->num_taken > 0) {
                ++entry;
                continue;
            }
            job->is_cancelled = true;
            entry = queue.erase(entry);
        }
        work_available.notify_all();
        progress.notify_all();
    }
    for (std::thread& thread : threads) thread.join();
    threads.clear();
}

int32_t gn_pool_create(gn_pool** pool, int32_t num_threads) {
    if (!pool || num_threads < 1 || num_threads > kMaxThreads) return -EINVAL;
    return gn::guarded([=]() -> int32_t {
        std::unique_ptr<gn_pool> created(new gn_pool);
        try {
            const auto count = static_cast<size_t>(num_threads);
            created->threads.reserve(count);
            created->thread_ids.reserve(count);
            while (created->threads.size() < count)
                created->threads.emplace_back(&gn_pool::work, created.get());
            std::unique_lock<std::mutex> lock(created->mutex);
            created->progress.wait(lock, [&] { return created->thread_ids.size() == count; });
        } catch (...) {
            created->shut_down();
            throw;
        }
        *pool = created.release();
        return 0;
    });
}

int32_t gn_pool_thread_ids(gn_pool* pool, int32_t* thread_ids) {
    if (!thread_ids) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        // Not written to after the pool was created.
        std::copy(pool->thread_ids.begin(), pool->thread_ids.end(), thread_ids);
        return 0;
    });
}

int32_t gn_pool_limit_background(gn_pool* pool, int32_t max_threads) {
    if (max_threads < 1) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        const std::lock_guard<std::mutex> guard(pool->mutex);
        pool->max_background = max_threads;
        pool->work_available.notify_all();
        return 0;
    });
}

int32_t gn_pool_shutdown(gn_pool* pool) {
    return gn::guarded_on(pool, [=]() -> int32_t {
        pool->shut_down();
        return 0;
    });
}

int32_t gn_pool_destroy(gn_pool* pool) {
    if (!pool) return 0;
    return gn::guarded_on(pool, [=]() -> int32_t {
        pool->shut_down();
        {
            std::unique_lock<std::mutex> lock(pool->mutex);
            pool->progress.wait(lock, [pool] { return pool->num_waiters == 0; });
        }
        delete pool;
        return 0;
    });
}

int32_t gn_pool_keep_spans(gn_pool* pool, int64_t capacity) {
    if (capacity < 0 || capacity > GN_MAX_SPANS) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        const std::lock_guard<std::mutex> guard(pool->mutex);
        pool->spans.keep(capacity);
        return 0;
    });
}

int64_t gn_pool_take_spans(gn_pool* pool, gn_span* spans, int64_t max_count) {
    if (max_count < 0 || (max_count > 0 && !spans)) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int64_t {
        const std::lock_guard<std::mutex> guard(pool->mutex);
        return pool->spans.take(spans, max_count);
    });
}

int32_t gn_pool_submit_adam(gn_pool* pool, const gn_adam_args* args, int32_t priority, uint64_t* ticket) {
    if (!ticket) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        const gn::Kernels* kernels = nullptr;
        if (const int32_t status = gn::check_adam(args, &kernels)) return status;
        return pool->submit(std::make_unique<AdamJob>(*args, kernels), priority, ticket);
    });
}

int32_t gn_pool_submit_adam_journalled(gn_pool* pool, const gn_adam_args* args,
                                       const gn_adam_journal* journal, int32_t priority, uint64_t* ticket) {
    if (!ticket) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        const gn::Kernels* kernels = nullptr;
        if (const int32_t status = gn::check_adam(args, &kernels)) return status;
        // Not written to after the pool was created.
        const auto num_threads = static_cast<int32_t>(pool->thread_ids.size());
        if (const int32_t status = gn::check_journal(journal, *args, num_threads)) return status;
        auto job = std::make_unique<JournalledAdamJob>(*args, *journal, kernels);
        return pool->submit(std::move(job), priority, ticket);
    });
}

int32_t gn_pool_submit_grad(gn_pool* pool, const gn_grad_args* args, int32_t priority, uint64_t* ticket) {
    if (!ticket) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        const gn::Kernels* kernels = nullptr;
        if (const int32_t status = gn::check_grad(args, &kernels)) return status;
        return pool->submit(std::make_unique<GradJob>(*args, kernels), priority, ticket);
    });
}

int32_t gn_pool_submit_sum(gn_pool* pool, const gn_sum_args* args, int32_t priority, uint64_t* ticket) {
    if (!ticket) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        const gn::Kernels* kernels = nullptr;
        if (const int32_t status = gn::check_sum(args, &kernels)) return status;
        return pool->submit(std::make_unique<SumJob>(*args, kernels), priority, ticket);
    });
}

int32_t gn_pool_submit_copy(gn_pool* pool, void* dst, const void* src, int64_t nbytes, int32_t priority,
                            uint64_t* ticket) {
    if (!ticket || nbytes < 0 || (nbytes > 0 && (!dst || !src))) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        return pool->submit(std::make_unique<CopyJob>(dst, src, nbytes), priority, ticket);
    });
}

int32_t gn_pool_submit_populate(gn_pool* pool, void* address, int64_t nbytes, int32_t priority,
                                uint64_t* ticket) {
    if (!ticket || nbytes < 0 || (nbytes > 0 && !address)) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        return pool->submit(std::make_unique<PopulateJob>(address, nbytes), priority, ticket);
    });
}

int32_t gn_pool_submit_sweep(gn_pool* pool, const gn_sweep_buffer* buffers, int64_t num_buffers,
                             uint64_t* checksum, int32_t priority, uint64_t* ticket) {
    if (!ticket || !checksum) return -EINVAL;
    return gn::guarded_on(pool, [=]() -> int32_t {
        if (const int32_t status = gn::check_sweep(buffers, num_buffers)) return status;
        return pool->submit(std::make_unique<SweepJob>(buffers, num_buffers, checksum), priority, ticket);
    });
}

int32_t gn_pool_wait(gn_pool* pool, uint64_t ticket, int64_t timeout_ns) {
    return gn::guarded_on(pool, [=]() -> int32_t { return pool->wait(ticket, timeout_ns); });
}
