// The engine's C interface.
#include <errno.h>
#include <sys/eventfd.h>

#include <memory>

#include "../include/gemini_native.h"
#include "c_api.h"
#include "io_backend.h"
#include "io_engine.h"

namespace {

constexpr int32_t kMaxQueueDepth = 4096;
constexpr int32_t kMaxThreads = 1024;

}  // namespace

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
    if (io == nullptr || queue_depth < 1 || queue_depth > kMaxQueueDepth) return -EINVAL;
    if (backend == GN_IO_THREADS && (num_threads < 1 || num_threads > kMaxThreads)) return -EINVAL;
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
