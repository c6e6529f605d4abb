#include "runtime.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <stdexcept>

namespace async_device {

Options options;
Counts counts;
std::atomic<uint64_t> random_state[kNumDevices][2];

namespace {

constexpr size_t kMaxCapacity = size_t{64} << 30;  // of addresses; pages come when they are touched
constexpr size_t kAlignment = 512;
constexpr size_t kSegmentNbytes = size_t{2} << 20;
constexpr size_t kMaxRecords = 1 << 20;

// Nothing here is ever destroyed: threads of streams may outlive the end of main.
std::mutex& failure_mutex = *new std::mutex;
std::string& failure = *new std::string;
std::mutex& record_mutex = *new std::mutex;
std::deque<Record>& records = *new std::deque<Record>;
std::mutex& host_mutex = *new std::mutex;
std::map<const char*, size_t>& locked_spans = *new std::map<const char*, size_t>;

/// A way between host and device that copies in one direction share.
struct Link {
    std::mutex mutex;
    int64_t free_ns = 0;

    /// Return when a copy that could begin now has passed.
    int64_t pass(size_t nbytes, int64_t nbytes_per_second) {
        std::lock_guard<std::mutex> lock(mutex);
        free_ns = std::max(free_ns, now_ns()) + int64_t(double(nbytes) * 1e9 / double(nbytes_per_second));
        return free_ns;
    }
};
Link& upload_link = *new Link;
Link& download_link = *new Link;

uint64_t mixed(uint64_t value) {  // the finalizer of splitmix64
    value += 0x9e3779b97f4a7c15;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return value ^ (value >> 31);
}

void sleep_until(int64_t ns) {
    const int64_t left = ns - now_ns();
    if (left > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(left));
}

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

size_t capacity() { return std::min(size_t(options.capacity_nbytes.load()), kMaxCapacity); }

struct Current {
    int device = 0;
    Stream* streams[kNumDevices] = {};
};
thread_local Current current;

}  // namespace

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// ---------------------------------------------------------------- streams

uint64_t Stream::submit(Kind kind, std::string name, size_t nbytes, std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!is_started_) std::thread([this] { run(); }).detach();
    is_started_ = true;
    jobs_.push_back({kind, std::move(name), nbytes, std::move(work)});
    has_work_.notify_one();
    return ++num_submitted_;
}

void Stream::wait(uint64_t ticket) {
    if (query(ticket)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    has_ended_.wait(lock, [&] { return is_done(ticket); });
}

bool Stream::query(uint64_t ticket) {
    if (is_done(ticket)) return true;
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_ = std::max(wanted_, ticket);
    has_work_.notify_one();
    return false;
}

void Stream::wake() {
    std::lock_guard<std::mutex> lock(mutex_);
    has_work_.notify_one();
}

bool Stream::may_begin(uint64_t ticket) const {
    if (jobs_.empty()) return false;
    const Kind kind = jobs_.front().kind;
    const bool is_copy = kind == Kind::kUpload || kind == Kind::kDownload;
    const bool is_lazy = (is_copy && options.has_lazy_copies.load() != 0) ||
                         (kind == Kind::kKernel && options.has_lazy_kernels.load() != 0);
    return !is_lazy || wanted_ >= ticket;
}

void Stream::run() {
    set_current_device(device);
    set_current_stream(*this);
    for (uint64_t ticket = 1;; ++ticket) {
        std::unique_lock<std::mutex> lock(mutex_);
        has_work_.wait(lock, [&] { return may_begin(ticket); });
        Job job = std::move(jobs_.front());
        jobs_.pop_front();
        lock.unlock();
        run_job(job, ticket);
        job.work = nullptr;
        lock.lock();
        num_done_.store(ticket);
        has_ended_.notify_all();
    }
}

void Stream::run_job(Job& job, uint64_t ticket) {
    const bool is_copy = job.kind == Kind::kUpload || job.kind == Kind::kDownload;
    const int64_t max_delay_us = is_copy                     ? options.max_copy_delay_us.load()
                                 : job.kind == Kind::kKernel ? options.max_kernel_delay_us.load()
                                                             : 0;
    if (max_delay_us > 0) {
        const uint64_t place = (uint64_t(device) << 56) + (uint64_t(index) << 48) + ticket;
        const uint64_t draw = mixed(mixed(uint64_t(options.seed.load())) ^ place);
        sleep_until(now_ns() + int64_t(draw % uint64_t(max_delay_us * 1000 + 1)));
    }
    Record record{};
    record.begin_ns = now_ns();
    try {
        job.work();
    } catch (const std::exception& error) {
        std::lock_guard<std::mutex> lock(failure_mutex);
        if (failure.empty()) failure = job.name + " failed on the device: " + error.what();
    }
    const int64_t rate = job.kind == Kind::kUpload     ? options.upload_nbytes_per_second.load()
                         : job.kind == Kind::kDownload ? options.download_nbytes_per_second.load()
                                                       : 0;
    if (rate > 0)
        sleep_until((job.kind == Kind::kUpload ? upload_link : download_link).pass(job.nbytes, rate));
    if (job.kind == Kind::kKernel) sleep_until(record.begin_ns + options.kernel_cost_us.load() * 1000);
    counts.number[int(job.kind)] += 1;
    counts.nbytes[int(job.kind)] += int64_t(job.nbytes);
    if (options.keeps_records.load() == 0) return;
    record.end_ns = now_ns();
    record.device = device;
    record.stream = index;
    record.kind = int32_t(job.kind);
    record.nbytes = int64_t(job.nbytes);
    std::strncpy(record.name, job.name.c_str(), sizeof(record.name) - 1);
    std::lock_guard<std::mutex> lock(record_mutex);
    records.push_back(record);
    if (records.size() > kMaxRecords) records.pop_front();
}

Mark Mark::of(Stream& stream) {
    auto reached_ns = std::make_shared<std::atomic<int64_t>>(0);
    const uint64_t ticket =
        stream.submit(Kind::kOther, "record", 0, [reached_ns] { reached_ns->store(now_ns()); });
    return {&stream, ticket, reached_ns};
}

void Mark::hold_up(Stream& other) const {
    if (stream == nullptr || stream == &other) return;
    other.submit(Kind::kOther, "wait", 0, [mark = *this] { mark.wait(); });
}

bool take_record(Record* into) {
    std::lock_guard<std::mutex> lock(record_mutex);
    if (records.empty()) return false;
    *into = records.front();
    records.pop_front();
    return true;
}

std::string take_failure() {
    std::lock_guard<std::mutex> lock(failure_mutex);
    return std::exchange(failure, std::string());
}

// ---------------------------------------------------------------- devices

Device::Device(int index) : index_(index) {
    for (int stream = 0; stream < kNumStreams; ++stream)
        streams_.push_back(std::make_unique<Stream>(index, stream));
    file_ = memfd_create("async_device", MFD_CLOEXEC);
    if (file_ < 0 || ftruncate(file_, off_t(kMaxCapacity)) != 0)
        throw std::runtime_error(std::string("no memory for a simulated device: ") + std::strerror(errno));
    void* views[2];
    for (int view = 0; view < 2; ++view) {
        const int access = view == 0 ? PROT_NONE : PROT_READ | PROT_WRITE;
        views[view] = mmap(nullptr, kMaxCapacity, access, MAP_SHARED | MAP_NORESERVE, file_, 0);
        if (views[view] == MAP_FAILED)
            throw std::runtime_error(std::string("no addresses for a simulated device: ") +
                                     std::strerror(errno));
        madvise(views[view], kMaxCapacity, MADV_DONTFORK);
    }
    for_tensors_ = static_cast<char*>(views[0]);
    for_kernels_ = static_cast<char*>(views[1]);
    space_.emplace(0, kMaxCapacity);
}

Device& device(int index) {
    static Device* devices[kNumDevices] = {new Device(0), new Device(1)};
    return *devices[index];
}

Device* owner_of(const void* address) {
    for (int index = 0; index < kNumDevices; ++index)
        if (device(index).owns(address)) return &device(index);
    return nullptr;
}

bool Device::owns(const void* address) const {
    const auto* byte = static_cast<const char*>(address);
    return byte >= for_tensors_ && byte < for_tensors_ + kMaxCapacity;
}

void* Device::seen_by_kernels(const void* address) const {
    return for_kernels_ + (static_cast<const char*>(address) - for_tensors_);
}

void Device::set_visibility(bool is_visible) {
    mprotect(for_tensors_, kMaxCapacity, is_visible ? PROT_READ | PROT_WRITE : PROT_NONE);
}

Stream& Device::next_of_pool() { return *streams_[1 + next_stream_++ % (kNumStreams - 1)]; }

void Device::wake() {
    for (auto& stream : streams_) stream->wake();
}

void Device::synchronize() {
    for (auto& stream : streams_) stream->wait(stream->last());
}

// ---------------------------------------------------------------- memory of devices

Block* Device::allocate(size_t nbytes, Stream& stream) {
    nbytes = round_up(nbytes, kAlignment);
    std::lock_guard<std::mutex> lock(mutex_);
    take_back_waiting(false);
    Block* block = take_free(nbytes, stream);
    if (block == nullptr) block = new_segment(nbytes, stream);
    if (block == nullptr) {  // what other streams keep for themselves may be enough
        take_back_waiting(true);
        block = take_free(nbytes, stream);
        if (block == nullptr) {
            release_segments();
            block = new_segment(nbytes, stream);
        }
    }
    if (block == nullptr) return nullptr;
    split(block, nbytes);
    block->is_free = false;
    statistics_.allocated += int64_t(block->nbytes);
    statistics_.peak_allocated = std::max(statistics_.peak_allocated, statistics_.allocated);
    if (options.fills_new_blocks.load() != 0) {
        void* memory = for_kernels_ + block->begin;
        stream.submit(Kind::kOther, "fill", 0, [memory, nbytes] { std::memset(memory, 0xff, nbytes); });
    }
    return block;
}

Block* Device::take_free(size_t nbytes, Stream& stream) {
    FreeBlocks& blocks = free_[&stream];
    const auto found = blocks.lower_bound({nbytes, 0});
    if (found == blocks.end()) return nullptr;
    Block* block = blocks_.at(found->second).get();
    blocks.erase(found);
    return block;
}

Block* Device::new_segment(size_t nbytes, Stream& stream) {
    nbytes = round_up(nbytes, nbytes < kSegmentNbytes / 2 ? kSegmentNbytes : kAlignment * 8);
    if (size_t(statistics_.reserved) + nbytes > capacity()) return nullptr;
    const auto span =
        std::find_if(space_.begin(), space_.end(), [&](const auto& each) { return each.second >= nbytes; });
    if (span == space_.end()) return nullptr;
    const auto [begin, span_nbytes] = *span;
    space_.erase(span);
    if (span_nbytes > nbytes) space_.emplace(begin + nbytes, span_nbytes - nbytes);
    statistics_.reserved += int64_t(nbytes);
    statistics_.peak_reserved = std::max(statistics_.peak_reserved, statistics_.reserved);
    auto block = std::make_unique<Block>(Block{begin, nbytes, &stream, true, nullptr, nullptr, {}, index_});
    return (blocks_[begin] = std::move(block)).get();
}

void Device::split(Block* block, size_t nbytes) {
    if (block->nbytes == nbytes) return;
    auto rest = std::make_unique<Block>(Block{
        block->begin + nbytes, block->nbytes - nbytes, block->stream, true, block, block->after, {}, index_});
    if (block->after != nullptr) block->after->before = rest.get();
    block->after = rest.get();
    block->nbytes = nbytes;
    free_[block->stream].emplace(rest->nbytes, rest->begin);
    blocks_[rest->begin] = std::move(rest);
}

void Device::free(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    statistics_.allocated -= int64_t(block->nbytes);
    if (block->used_by.empty()) {
        put_free(block);
        return;
    }
    Waiting waiting{block, {}};
    for (Stream* stream : block->used_by) waiting.marks.push_back({stream, stream->last(), nullptr});
    block->used_by.clear();
    waiting_.push_back(std::move(waiting));
}

void Device::record(Block* block, Stream& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (&stream != block->stream) block->used_by.insert(&stream);
}

void Device::put_free(Block* block) {
    FreeBlocks& blocks = free_[block->stream];
    for (Block* neighbour : {block->before, block->after}) {
        if (neighbour == nullptr || !neighbour->is_free) continue;
        blocks.erase({neighbour->nbytes, neighbour->begin});
        Block* first = neighbour == block->before ? neighbour : block;
        Block* second = first == block ? neighbour : block;
        first->nbytes += second->nbytes;
        first->after = second->after;
        if (first->after != nullptr) first->after->before = first;
        blocks_.erase(second->begin);
        block = first;
    }
    block->is_free = true;
    blocks.emplace(block->nbytes, block->begin);
}

void Device::take_back_waiting(bool blocks) {
    for (auto each = waiting_.begin(); each != waiting_.end();) {
        bool is_reached = true;
        for (const Mark& mark : each->marks) {
            if (blocks) mark.wait();
            is_reached = is_reached && mark.is_reached();
        }
        if (is_reached) put_free(each->block);
        each = is_reached ? waiting_.erase(each) : std::next(each);
    }
}

void Device::release_segments() {
    synchronize();  // as cudaFree does: the next owner may be any stream
    for (auto& [stream, blocks] : free_) {
        for (auto each = blocks.begin(); each != blocks.end();) {
            Block* block = blocks_.at(each->second).get();
            if (block->before != nullptr || block->after != nullptr) {
                ++each;
                continue;
            }
            each = blocks.erase(each);
            statistics_.reserved -= int64_t(block->nbytes);
            fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(block->begin),
                      off_t(block->nbytes));
            auto span = space_.emplace(block->begin, block->nbytes).first;
            blocks_.erase(span->first);
            const auto next = std::next(span);
            if (next != space_.end() && span->first + span->second == next->first) {
                span->second += next->second;
                space_.erase(next);
            }
            if (span != space_.begin()) {
                const auto before = std::prev(span);
                if (before->first + before->second == span->first) {
                    before->second += span->second;
                    space_.erase(span);
                }
            }
        }
    }
}

void Device::empty_cache() {
    std::lock_guard<std::mutex> lock(mutex_);
    take_back_waiting(true);
    release_segments();
}

MemoryStatistics Device::statistics() {
    std::lock_guard<std::mutex> lock(mutex_);
    return statistics_;
}

void Device::reset_peaks() {
    std::lock_guard<std::mutex> lock(mutex_);
    statistics_.peak_allocated = statistics_.allocated;
    statistics_.peak_reserved = statistics_.reserved;
}

// ---------------------------------------------------------------- threads, the host's memory, random numbers

Stream& current_stream(int index) {
    Stream* stream = current.streams[index];
    return stream != nullptr ? *stream : device(index).stream(0);
}

void set_current_stream(Stream& stream) { current.streams[stream.device] = &stream; }

int current_device() { return current.device; }

void set_current_device(int index) { current.device = index; }

void lock_host_memory(const void* address, size_t nbytes) {
    std::lock_guard<std::mutex> lock(host_mutex);
    locked_spans[static_cast<const char*>(address)] = nbytes;
}

bool unlock_host_memory(const void* address) {
    std::lock_guard<std::mutex> lock(host_mutex);
    return locked_spans.erase(static_cast<const char*>(address)) == 1;
}

bool is_locked(const void* address) {
    std::lock_guard<std::mutex> lock(host_mutex);
    auto span = locked_spans.upper_bound(static_cast<const char*>(address));
    if (span == locked_spans.begin()) return false;
    --span;
    return static_cast<const char*>(address) < span->first + span->second;
}

void free_later(void* address, size_t nbytes) {
    struct Freed {
        void* address;
        size_t nbytes;
        std::vector<Mark> marks;
    };
    static std::list<Freed>& all_freed = *new std::list<Freed>;
    Freed freed{address, nbytes, {}};
    for (int index = 0; index < kNumDevices; ++index)
        for (int number = 0; number < kNumStreams; ++number) {
            Stream& stream = device(index).stream(number);
            if (!stream.is_done(stream.last())) freed.marks.push_back({&stream, stream.last(), nullptr});
        }
    std::lock_guard<std::mutex> lock(host_mutex);
    all_freed.push_back(std::move(freed));
    all_freed.remove_if([](const Freed& each) {
        for (const Mark& mark : each.marks)
            if (!mark.is_reached()) return false;
        munmap(each.address, each.nbytes);
        locked_spans.erase(static_cast<const char*>(each.address));
        return true;
    });
}

uint64_t next_seed(int index) {
    return mixed(random_state[index][0].load() ^ mixed(++random_state[index][1]));
}

}  // namespace async_device
