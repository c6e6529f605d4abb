// The seam between the I/O engine and a kernel interface.
//
// The engine (io_engine.h) knows files, tickets, splitting and errors; a backend only carries
// transfers to the kernel and back. Every method is called from the engine's service thread alone.
#ifndef GEMINI_IO_BACKEND_H
#define GEMINI_IO_BACKEND_H

#include <sys/uio.h>

#include <cstdint>
#include <memory>

namespace gn::io {

// One read or write as the kernel sees it: the unfinished part of a request, at most 1 GiB.
struct Transfer {
    int fd = -1;
    bool is_write = false;
    char* buffer = nullptr;
    int64_t nbytes = 0;
    int64_t offset = 0;
    int64_t result = 0;        // out: bytes moved or -errno
    struct iovec span = {};    // scratch of the backend; must live as long as the transfer
    Transfer* next = nullptr;  // link of whoever holds the transfer
};

class Backend {
  public:
    virtual ~Backend() = default;

    // Hand over transfers without waiting for the device. Returns how many from the front were taken
    // (>= 1) or -errno: -EAGAIN asks to try again later, any other error concerns transfers[0].
    virtual int32_t submit(Transfer* const* transfers, int32_t count) = 0;

    // Collect up to `capacity` finished transfers, `result` filled, without blocking; returns how many.
    virtual int32_t reap(Transfer** finished, int32_t capacity) = 0;
};

// Create a backend with at most `queue_depth` transfers at a time. It adds to `event_fd` (an eventfd,
// which it does not own) whenever a transfer has finished. Return 0 or -errno; may throw.
int32_t make_uring_backend(std::unique_ptr<Backend>* backend, int32_t queue_depth, int event_fd);
int32_t make_aio_backend(std::unique_ptr<Backend>* backend, int32_t queue_depth, int event_fd);
int32_t make_threads_backend(std::unique_ptr<Backend>* backend, int32_t num_threads, int event_fd);

// Create the backend that a gn_io_backend names; -EINVAL: it names none.
int32_t make_backend(std::unique_ptr<Backend>* backend, int32_t kind, int32_t queue_depth,
                     int32_t num_threads, int event_fd);

// Blocks every signal in the calling thread while alive, so that threads started meanwhile never run
// handlers, and a write beyond RLIMIT_FSIZE is an error there instead of a deadly SIGXFSZ.
class SignalBlocker {
  public:
    SignalBlocker();
    ~SignalBlocker();
    SignalBlocker(const SignalBlocker&) = delete;
    SignalBlocker& operator=(const SignalBlocker&) = delete;

  private:
    struct Mask;
    std::unique_ptr<Mask> previous_;
};

// Add one to an eventfd.
void signal_event(int event_fd);

}  // namespace gn::io

#endif  // GEMINI_IO_BACKEND_H
