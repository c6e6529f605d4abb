// A device that is not there: streams that are threads, events, and memory that the host cannot touch. Knows
// nothing of torch; async_device.cpp makes it one of torch's accelerators.
//
// [Note: Two views of one memory]
// A device's memory is one anonymous file, mapped twice. Tensors hold addresses of the first view, which is
// without access unless an option opens it: whoever dereferences one on the host gets a segmentation fault,
// at any time and for certain. Kernels and copies use the second view, which `Device::seen_by_kernels`
// translates to.
//
// [Note: The latest order]
// What is lazy begins only once somebody waits for it: the host, or a stream that has come to an event behind
// it. That is the latest that any device may run it, so what does not wait is too early for certain, however
// fast or slow the machine is that plays the device. To ask whether it has ended counts as waiting, from then
// on.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace async_device {

constexpr int kNumDevices = 2;
constexpr int kNumStreams = 33;  // of each device: the default one and a pool that is dealt out in turn

enum class Kind : int32_t { kKernel, kUpload, kDownload, kCopy, kOther };  // _KINDS in __init__.py mirrors it

/// What can be set, all of it at any time; `_OPTIONS` in __init__.py names the fields in this order.
struct Options {
    std::atomic<int64_t> seed{0};                      ///< of the random delays
    std::atomic<int64_t> max_kernel_delay_us{0};       ///< before each kernel: uniform from 0 to this
    std::atomic<int64_t> max_copy_delay_us{0};         ///< before each copy between host and device
    std::atomic<int64_t> has_lazy_kernels{0};          ///< 1: see [Note: The latest order]
    std::atomic<int64_t> has_lazy_copies{0};           ///< 1: the same for copies between host and device
    std::atomic<int64_t> kernel_cost_us{0};            ///< how long each kernel takes at least
    std::atomic<int64_t> upload_nbytes_per_second{0};  ///< of all uploads together; 0: no limit
    std::atomic<int64_t> download_nbytes_per_second{0};
    std::atomic<int64_t> capacity_nbytes{int64_t{4} << 30};  ///< of each device; at most kMaxCapacity
    std::atomic<int64_t> is_visible_to_host{0};              ///< 1: the host may read and write device memory
    std::atomic<int64_t> fills_new_blocks{0};  ///< 1: memory that is handed out is full of 0xff bytes
    std::atomic<int64_t> keeps_records{0};     ///< 1: `take_record` tells what has run
};
extern Options options;

/// Something that has run on a stream. `_Record` in __init__.py mirrors it.
struct Record {
    char name[56];
    int32_t device;
    int32_t stream;
    int32_t kind;
    int32_t padding;
    int64_t nbytes;
    int64_t begin_ns;  ///< of the steady clock, as are all times here
    int64_t end_ns;
};

int64_t now_ns();

/// A queue and the thread that works it off, in order. Started when it is first used.
class Stream {
  public:
    Stream(int device, int index) : device(device), index(index) {}

    /// Put work at the end of the queue; returns its ticket. The work must own no memory of the device, or
    /// the allocator would never reuse it too early.
    uint64_t submit(Kind kind, std::string name, size_t nbytes, std::function<void()> work);
    bool is_done(uint64_t ticket) const { return num_done_.load() >= ticket; }
    /// Return whether work has ended, and want it to.
    bool query(uint64_t ticket);
    /// Block until work has ended.
    void wait(uint64_t ticket);
    /// Let the thread look at the options again.
    void wake();
    /// The ticket of what was submitted last; 0: nothing was.
    uint64_t last() const { return num_submitted_.load(); }

    const int device;
    const int index;

  private:
    struct Job {
        Kind kind;
        std::string name;
        size_t nbytes;
        std::function<void()> work;
    };
    void run();
    bool may_begin(uint64_t ticket) const;
    void run_job(Job& job, uint64_t ticket);

    std::mutex mutex_;
    std::condition_variable has_work_, has_ended_;
    std::deque<Job> jobs_;
    std::atomic<uint64_t> num_submitted_{0}, num_done_{0};
    uint64_t wanted_ = 0;  // the last ticket that somebody has waited for
    bool is_started_ = false;
};

/// A point in a stream.
struct Mark {
    Stream* stream = nullptr;
    uint64_t ticket = 0;
    std::shared_ptr<std::atomic<int64_t>> reached_ns;

    static Mark of(Stream& stream);
    bool is_reached() const { return stream == nullptr || stream->is_done(ticket); }
    bool query() const { return stream == nullptr || stream->query(ticket); }
    void wait() const {
        if (stream != nullptr) stream->wait(ticket);
    }
    /// Let a stream go on only once the mark is reached.
    void hold_up(Stream& other) const;
};

struct Block {
    size_t begin, nbytes;
    Stream* stream;  ///< whose allocations it serves
    bool is_free;
    Block* before;
    Block* after;               ///< neighbours in the same segment
    std::set<Stream*> used_by;  ///< others that were recorded
    int device;
};

struct MemoryStatistics {
    int64_t allocated, peak_allocated, reserved, peak_reserved;
};

/// One device: its memory, dealt out as torch's allocator for CUDA does, and its streams.
class Device {
  public:
    explicit Device(int index);

    Stream& stream(int index) { return *streams_[index]; }
    Stream& next_of_pool();
    void synchronize();
    /// Let all streams look at the options again.
    void wake();

    /// Return a block, or nullptr where the capacity does not allow it. A block that was freed serves the
    /// stream that it belonged to at once, though that stream may not have come to the end of its last use
    /// yet.
    Block* allocate(size_t nbytes, Stream& stream);
    void free(Block* block);
    void record(Block* block, Stream& stream);
    /// Give the segments back that are free as a whole; waits for the device.
    void empty_cache();
    MemoryStatistics statistics();
    void reset_peaks();
    void set_visibility(bool is_visible);

    void* address_of(const Block& block) { return for_tensors_ + block.begin; }
    bool owns(const void* address) const;
    void* seen_by_kernels(const void* address) const;

  private:
    using FreeBlocks = std::set<std::pair<size_t, size_t>>;  // bytes, begin
    struct Waiting {
        Block* block;
        std::vector<Mark> marks;
    };

    Block* take_free(size_t nbytes, Stream& stream);
    Block* new_segment(size_t nbytes, Stream& stream);
    void split(Block* block, size_t nbytes);
    void put_free(Block* block);
    void take_back_waiting(bool blocks);
    void release_segments();

    const int index_;
    char* for_tensors_ = nullptr;
    char* for_kernels_ = nullptr;
    int file_ = -1;
    std::vector<std::unique_ptr<Stream>> streams_;
    std::atomic<unsigned> next_stream_{0};
    std::mutex mutex_;
    std::map<size_t, size_t> space_;  // begin of each span of addresses without a segment, and its bytes
    std::unordered_map<size_t, std::unique_ptr<Block>> blocks_;  // by their begin
    std::unordered_map<Stream*, FreeBlocks> free_;
    std::list<Waiting> waiting_;
    MemoryStatistics statistics_{};
};

Device& device(int index);
/// The device that an address is of; nullptr: of none.
Device* owner_of(const void* address);

/// What stream the calling thread works on, and which device. Threads begin on device 0 and default streams.
Stream& current_stream(int device);
void set_current_stream(Stream& stream);
int current_device();
void set_current_device(int index);

/// Page-locked memory of the host: copies from and to it need not wait.
void lock_host_memory(const void* address, size_t nbytes);
bool unlock_host_memory(const void* address);
bool is_locked(const void* address);
/// What the host no longer needs but copies under way may: freed once all streams have come as far as they
/// are now.
void free_later(void* address, size_t nbytes);

/// A seed for the next random kernel of a device, or where its sequence stands.
uint64_t next_seed(int device);
extern std::atomic<uint64_t> random_state[kNumDevices][2];  // seed, number of seeds drawn

/// Fail if a kernel has; the message names it. Each failure is told once.
std::string take_failure();

struct Counts {
    std::atomic<int64_t> number[5]{}, nbytes[5]{};
};
extern Counts counts;
bool take_record(Record* into);

}  // namespace async_device
