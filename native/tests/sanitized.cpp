// The library's own test program: everything behind gemini_native.h, from several threads, under sanitizers.
//
// `make sanitize` builds it with the address and undefined-behaviour sanitizers and again with the thread
// sanitizer. Values are tested from Python; here they are checked only as far as that shows that every path
// has been taken.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gemini_native.h"

namespace {

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

constexpr int64_t kBlockNbytes = 4096;
constexpr int64_t kForEver = -1;

std::vector<int32_t> instruction_sets() {
    std::vector<int32_t> found;
    for (int32_t isa : {GN_ISA_SCALAR, GN_ISA_AVX2, GN_ISA_AVX512, GN_ISA_NEON})
        if (gn_isa_check(isa) == 0) found.push_back(isa);
    return found;
}

// ---------------------------------------------------------------------- kernels

// A tensor whose storage has exactly its bytes, so that one element too far is seen, at an odd address.
template <typename T>
struct Tensor {
    explicit Tensor(int64_t count, T value = T())
        : numel(count), storage(new T[static_cast<size_t>(count) + 1]) {
        for (int64_t i = 0; i <= count; ++i) storage[static_cast<size_t>(i)] = value;
    }
    T* data() { return storage.get() + 1; }
    int64_t numel;
    std::unique_ptr<T[]> storage;
};

void run_casts(int64_t numel, int32_t isa) {
    Tensor<float> master(numel, 1.5f), joined(numel);
    Tensor<uint16_t> working(numel);
    Tensor<int16_t> residual(numel);
    for (int32_t half : {GN_DTYPE_BF16, GN_DTYPE_F16}) {
        CHECK(gn_cast(working.data(), half, master.data(), GN_DTYPE_F32, numel, isa) == 0);
        CHECK(gn_cast(joined.data(), GN_DTYPE_F32, working.data(), half, numel, isa) == 0);
        CHECK(numel == 0 || joined.data()[numel - 1] == 1.5f);
    }
    CHECK(gn_split_master(working.data(), residual.data(), master.data(), numel, isa) == 0);
    CHECK(gn_join_master(joined.data(), working.data(), residual.data(), numel, isa) == 0);
    CHECK(memcmp(joined.data(), master.data(), static_cast<size_t>(numel) * sizeof(float)) == 0);
}

struct Update {
    Update(int64_t numel, int32_t format, int32_t grad_dtype, int32_t isa)
        : working(numel, 1.0f),
          master(numel, 1.0f),
          momentum(numel),
          variance(numel),
          grad(numel, 0.5f),
          segment{0, numel, 0.1f, 0.999f, 0.001f, -1e-3f, 1.0f, 1e-8f, 1.0f, 0.0f} {
        args.format = format;
        args.grad_dtype = grad_dtype;
        args.isa = isa;
        args.grad_scale = 1.0f;
        args.working = working.data();
        args.master = format == GN_FORMAT_F32 ? nullptr : master.data();
        args.momentum = momentum.data();
        args.variance = variance.data();
        args.grad = grad.data();
        args.numel = numel;
        args.segments = &segment;
        args.num_segments = 1;
    }
    Tensor<float> working, master, momentum, variance, grad;
    gn_adam_segment segment;
    gn_adam_args args = {};
};

void run_updates(int64_t numel, int32_t isa) {
    for (int32_t format : {GN_FORMAT_SPLIT_BF16, GN_FORMAT_F16_MASTER, GN_FORMAT_F32})
        for (int32_t dtype : {GN_DTYPE_F32, GN_DTYPE_BF16, GN_DTYPE_F16}) {
            Update update(numel, format, dtype, isa);
            CHECK(gn_adam_update(&update.args) == 0);
            Update target(numel, format, dtype, isa);
            target.args.from_working = update.args.working;
            target.args.from_master = update.args.master;
            target.args.from_momentum = update.args.momentum;
            target.args.from_variance = update.args.variance;
            CHECK(gn_adam_update(&target.args) == 0);
        }
    Update update(numel, GN_FORMAT_F32, GN_DTYPE_F32, isa);
    update.segment.end = numel + 1;
    CHECK(gn_adam_update(&update.args) == -EINVAL);
}

gn_grad_args store_args(Tensor<float>* dst, Tensor<float>* src, int32_t mode, int32_t isa, double* sumsq) {
    gn_grad_args args = {};
    args.mode = mode;
    args.isa = isa;
    args.src = src->data();
    args.dst = dst->data();
    args.numel = src->numel;
    args.sumsq = sumsq;
    return args;
}

void run_sums(int64_t numel, int32_t isa) {
    Tensor<float> first(numel, 1.0f), second(numel, 2.0f), sum(numel);
    const void* parts[] = {first.data(), second.data()};
    gn_sum_args args = {};
    args.isa = isa;
    args.num_parts = 2;
    args.parts = parts;
    args.dst = sum.data();
    args.numel = numel;
    args.divisor = 2.0f;
    CHECK(gn_sum_parts(&args) == 0);
    CHECK(numel == 0 || sum.data()[numel - 1] == 1.5f);
    args.dst = first.data();
    CHECK(gn_sum_parts(&args) == 0);
    args.num_parts = 0;
    CHECK(gn_sum_parts(&args) == -EINVAL);
}

void run_gradients(int64_t numel, int32_t isa) {
    Tensor<float> src(numel, 2.0f), dst(numel);
    for (int32_t mode : {GN_GRAD_STORE, GN_GRAD_ADD}) {
        double sumsq = -1;
        const gn_grad_args args = store_args(&dst, &src, mode, isa, &sumsq);
        CHECK(gn_grad_store(&args) == 0);
        CHECK(sumsq == (mode == GN_GRAD_STORE ? 4.0 : 16.0) * static_cast<double>(numel));
    }
}

void test_kernels() {
    for (int32_t isa : instruction_sets())
        for (int64_t numel : {0, 1, 7, 8, 15, 31, 33, 4095, 4096, 4097, 70000}) {
            run_casts(numel, isa);
            run_updates(numel, isa);
            run_gradients(numel, isa);
            run_sums(numel, isa);
        }
}

// ---------------------------------------------------------------------- first touch

void test_populate() {
    for (int64_t nbytes : {int64_t{0}, int64_t{4096}, int64_t{20} << 20}) {
        Tensor<char> memory(nbytes, 'x');
        CHECK(gn_memory_populate(memory.data(), nbytes, GN_POPULATE_BY_TOUCH) == 0);
        CHECK(gn_memory_populate(memory.data(), nbytes, 3) == -EINVAL);
        for (int64_t i = 0; i < nbytes; i += 4096) CHECK(memory.data()[i] == 'x');
    }
    CHECK(gn_memory_populate(nullptr, 1, GN_POPULATE_BY_TOUCH) == -EINVAL);
}

// ---------------------------------------------------------------------- checksums

void test_checksums() {
    for (int32_t method : {GN_CRC_AUTO, GN_CRC_PORTABLE, GN_CRC_INSTRUCTION}) {
        uint32_t crc = 0;
        const int32_t status = gn_crc32c(&crc, "123456789", 9, method);
        CHECK(status == 0 || (status == -ENOTSUP && method == GN_CRC_INSTRUCTION));
        CHECK(status != 0 || crc == 0xE3069283);
        for (int64_t nbytes : {0, 1, 7, 8, 4079, 4080, 4081, 4096, 12289}) {
            Tensor<char> text(nbytes, 'x');
            CHECK(gn_crc32c(&crc, text.data(), nbytes, method) == status);
        }
    }
}

// ---------------------------------------------------------------------- worker pool

// Take spans beside those who make them; each has a length.
template <class Take>
void check_spans(Take take) {
    gn_span spans[4];
    for (int round = 0; round < 20; ++round)
        for (int64_t i = take(spans, 4); i-- > 0;)
            CHECK(spans[i].ticket > 0 && spans[i].begin_ns <= spans[i].end_ns);
}

// One of several threads that share a pool; every job has tensors of its own.
void use_pool(gn_pool* pool, int32_t isa) {
    for (int64_t numel : {0, 1, 70000, 200000}) {
        Update update(numel, GN_FORMAT_F32, GN_DTYPE_F32, isa);
        Tensor<float> src(numel, 2.0f), dst(numel), copy(numel);
        double sumsq = -1;
        uint64_t checksum = 0, tickets[5];
        Tensor<float> sum(numel);
        const void* parts[] = {src.data(), src.data(), src.data()};
        gn_sum_args adding = {};
        adding.isa = isa;
        adding.num_parts = 3;
        adding.parts = parts;
        adding.dst = sum.data();
        adding.numel = numel;
        adding.divisor = 1.0f;
        const gn_grad_args gradient = store_args(&dst, &src, GN_GRAD_STORE, isa, &sumsq);
        const gn_sweep_buffer swept = {src.data(), numel * 4, GN_SWEEP_READ};
        CHECK(gn_pool_submit_adam(pool, &update.args, 2, &tickets[0]) == 0);
        CHECK(gn_pool_submit_grad(pool, &gradient, GN_PRIORITY_BACKGROUND, &tickets[1]) == 0);
        CHECK(gn_pool_submit_copy(pool, copy.data(), src.data(), numel * 4, 0, &tickets[2]) == 0);
        CHECK(gn_pool_submit_sweep(pool, &swept, 1, &checksum, 1, &tickets[3]) == 0);
        CHECK(gn_pool_submit_sum(pool, &adding, 0, &tickets[4]) == 0);
        CHECK(gn_pool_limit_background(pool, 1) == 0);
        for (uint64_t ticket : tickets) CHECK(gn_pool_wait(pool, ticket, kForEver) == 0);
        CHECK(sumsq == 4.0 * static_cast<double>(numel));
        CHECK(numel == 0 || copy.data()[numel - 1] == 2.0f);
        CHECK(numel == 0 || sum.data()[numel - 1] == 6.0f);
    }
}

void test_pool() {
    const int32_t isa = gn_isa_best();
    gn_pool* pool = nullptr;
    CHECK(gn_pool_create(&pool, 3) == 0);
    CHECK(gn_pool_keep_spans(pool, 30) == 0);
    std::vector<std::thread> users;
    for (int i = 0; i < 4; ++i) users.emplace_back(use_pool, pool, isa);
    check_spans([=](gn_span* spans, int64_t count) { return gn_pool_take_spans(pool, spans, count); });
    for (std::thread& user : users) user.join();
    CHECK(gn_pool_keep_spans(pool, 0) == 0);

    // Shut down with work queued and a thread waiting for it.
    constexpr int64_t kSmall = 4096, kNumSmall = 19, kLarge = 8 << 20;
    Tensor<char> src(kNumSmall * kSmall + kLarge, 'x'), dst(src.numel);
    uint64_t ticket = 0;
    for (int64_t i = 0; i <= kNumSmall; ++i)
        CHECK(gn_pool_submit_copy(pool, dst.data() + i * kSmall, src.data(), i < kNumSmall ? kSmall : kLarge,
                                  0, &ticket) == 0);
    std::thread waiter([&] {
        const int32_t status = gn_pool_wait(pool, ticket, kForEver);
        CHECK(status == 0 || status == -ECANCELED);
    });
    CHECK(gn_pool_shutdown(pool) == 0);
    CHECK(gn_pool_submit_copy(pool, dst.data(), src.data(), 1, 0, &ticket) == -ECANCELED);
    waiter.join();
    CHECK(gn_pool_destroy(pool) == 0);
}

// ---------------------------------------------------------------------- events

// Two threads take turns, each woken by the other's word.
void test_events() {
    uint32_t event = 0;
    uint64_t turn = 0;
    const auto take_turns = [&](uint64_t parity) {
        for (uint64_t round = parity; round < 200; round += 2) {
            for (;;) {
                const uint32_t seen = gn_event_load(&event);
                if (gn_memory_load(&turn) == round) break;
                CHECK(gn_event_wait(&event, seen, kForEver) == 0);
            }
            gn_memory_publish(&turn, round + 1);
            CHECK(gn_event_signal(&event) == 0);
        }
    };
    std::thread other(take_turns, 1);
    take_turns(0);
    other.join();
    CHECK(gn_memory_load(&turn) == 200);
    CHECK(gn_event_wait(&event, gn_event_load(&event), 1000) == -ETIMEDOUT);
    CHECK(gn_event_wait(&event, gn_event_load(&event) + 1, kForEver) == 0);
}

// ---------------------------------------------------------------------- I/O engines

struct AlignedBuffer {
    explicit AlignedBuffer(int64_t nbytes, char value = 0)
        : data(static_cast<char*>(aligned_alloc(kBlockNbytes, static_cast<size_t>(nbytes)))), size(nbytes) {
        memset(data, value, static_cast<size_t>(nbytes));
    }
    ~AlignedBuffer() { free(data); }
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;
    char* data;
    int64_t size;
};

int32_t transfer(gn_io* io, int32_t file, int32_t op, void* buffer, int64_t nbytes, int64_t offset) {
    const gn_io_request request = {file, op, buffer, nbytes, offset};
    uint64_t ticket = 0;
    CHECK(gn_io_submit(io, &request, 1, &ticket) == 0);
    return gn_io_wait(io, ticket, kForEver, nullptr);
}

// One of several threads that share an engine; each has a part of the file of its own.
void use_file(gn_io* io, int32_t file, int32_t number) {
    const int64_t begin = number * 64 * kBlockNbytes;
    AlignedBuffer source(8 * kBlockNbytes, static_cast<char>('a' + number)), target(8 * kBlockNbytes);
    for (int round = 0; round < 4; ++round) {
        CHECK(transfer(io, file, GN_IO_WRITE, source.data, source.size, begin + round * source.size) == 0);
        CHECK(transfer(io, file, GN_IO_READ, target.data, target.size, begin + round * source.size) == 0);
        CHECK(memcmp(source.data, target.data, static_cast<size_t>(source.size)) == 0);
    }
    // Not aligned: through the page cache, and without checksums at both ends.
    CHECK(transfer(io, file, GN_IO_WRITE, source.data + 3, 5000, begin + 40 * kBlockNbytes + 7) == 0);
    CHECK(transfer(io, file, GN_IO_READ, target.data + 3, 5000, begin + 40 * kBlockNbytes + 7) == 0);
    CHECK(memcmp(source.data + 3, target.data + 3, 5000) == 0);
}

void test_mismatch(gn_io* io, int32_t file, const std::string& path) {
    AlignedBuffer source(4 * kBlockNbytes, 'x'), target(4 * kBlockNbytes);
    CHECK(transfer(io, file, GN_IO_WRITE, source.data, source.size, 0) == 0);
    const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
    CHECK(fd >= 0 && pwrite(fd, "y", 1, 2 * kBlockNbytes + 9) == 1 && fsync(fd) == 0 && close(fd) == 0);
    const gn_io_request request = {file, GN_IO_READ, target.data, target.size, 0};
    uint64_t ticket = 0;
    gn_io_result result;
    CHECK(gn_io_submit(io, &request, 1, &ticket) == 0);
    CHECK(gn_io_wait(io, ticket, kForEver, &result) == -EBADMSG);
    CHECK(result.status == -EBADMSG && result.nbytes_done == 2 * kBlockNbytes);
}

// End an engine with transfers queued, in the kernel and waited for.
void test_ending(gn_io* io, int32_t file) {
    AlignedBuffer source(64 * kBlockNbytes, 'z');
    std::vector<gn_io_request> requests(100, gn_io_request{file, GN_IO_WRITE, source.data, source.size, 0});
    std::vector<uint64_t> tickets(requests.size());
    CHECK(gn_io_submit(io, requests.data(), static_cast<int64_t>(requests.size()), tickets.data()) == 0);
    CHECK(gn_io_close(io, file) == -EBUSY || gn_io_close(io, file) == -EBADF);
    CHECK(gn_io_destroy(io) == 0);
}

void test_engine(int32_t backend, const std::string& path) {
    gn_io* io = nullptr;
    CHECK(gn_io_create(&io, backend, 4, 2) == 0);
    constexpr int32_t kFlags = GN_IO_OPEN_READ | GN_IO_OPEN_WRITE | GN_IO_OPEN_CREATE | GN_IO_OPEN_DIRECT;
    const int32_t file = gn_io_open(io, path.c_str(), kFlags);
    CHECK(file >= 0);
    CHECK(gn_io_verify(io, file, 300 * kBlockNbytes) == 0);
    std::vector<std::thread> users;
    CHECK(gn_io_keep_spans(io, 30) == 0);
    for (int32_t number = 0; number < 4; ++number) users.emplace_back(use_file, io, file, number);
    check_spans([=](gn_span* spans, int64_t count) { return gn_io_take_spans(io, spans, count); });
    for (std::thread& user : users) user.join();
    test_mismatch(io, file, path);

    AlignedBuffer beyond(kBlockNbytes);
    CHECK(transfer(io, file, GN_IO_READ, beyond.data, beyond.size, int64_t{1} << 40) == -ENODATA);
    CHECK(gn_io_sync(io, file) == 0);
    int64_t nbytes_read = 0, nbytes_written = 0;
    CHECK(gn_io_stats(io, &nbytes_read, &nbytes_written) == 0);
    CHECK(nbytes_read > 0 && nbytes_written > 0);
    test_ending(io, file);
}

void test_engines(const std::string& directory) {
    for (int32_t backend : {GN_IO_URING, GN_IO_AIO, GN_IO_THREADS}) {
        if (gn_io_probe(backend) != 0) continue;
        const std::string path = directory + "/engine-" + std::to_string(backend);
        test_engine(backend, path);
        CHECK(unlink(path.c_str()) == 0);
    }
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 2);
    test_kernels();
    test_populate();
    test_checksums();
    test_pool();
    test_events();
    test_engines(argv[1]);
    puts("sanitized: all paths ran clean");
    return 0;
}
