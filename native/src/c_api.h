// Internal: what every function of the C interface does around its work: no exception leaves it, nothing is
// touched in the child of a fork, and timeouts mean the same everywhere.
#ifndef GEMINI_C_API_H
#define GEMINI_C_API_H

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>

namespace gn {

// A member of every object that has threads. The child of a fork has the object's memory but not its
// threads, and its mutexes in any state: there, nothing but -ESRCH is safe.
class ForkGuard {
  public:
    bool is_in_child() const { return process_ != getpid(); }

  private:
    const pid_t process_ = getpid();
};

// Run `body`, which returns a status or a count; what it throws becomes a negative errno.
template <class Body>
auto guarded(Body body) noexcept -> decltype(body()) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return -ENOMEM;
    } catch (const std::length_error&) {
        return -ENOMEM;
    } catch (const std::system_error& error) {
        return error.code().value() > 0 ? -error.code().value() : -EIO;
    } catch (...) {
        return -EIO;
    }
}

// Run `body` on an object that has a `fork_guard`.
template <class Handle, class Body>
auto guarded_on(const Handle* handle, Body body) noexcept -> decltype(body()) {
    if (handle == nullptr) return -EINVAL;
    if (handle->fork_guard.is_in_child()) return -ESRCH;
    return guarded(body);
}

// 36 years; a longer wait counts as a wait without limit, and the clock cannot overflow.
constexpr int64_t kLongestWaitNs = int64_t{1} << 60;

// Wait until `is_done()`, at most `timeout_ns`, without limit if that is negative; returns `is_done()`.
template <class Condition>
bool wait_until(std::condition_variable* changed, std::unique_lock<std::mutex>* lock, int64_t timeout_ns,
                Condition is_done) {
    if (timeout_ns == 0) return is_done();
    if (timeout_ns > 0 && timeout_ns <= kLongestWaitNs)
        return changed->wait_for(*lock, std::chrono::nanoseconds(timeout_ns), is_done);
    changed->wait(*lock, is_done);
    return true;
}

}  // namespace gn

#endif  // GEMINI_C_API_H
