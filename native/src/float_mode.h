// Internal: IEEE 754 defaults for the length of a scope.
#ifndef GEMINI_FLOAT_MODE_H
#define GEMINI_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gn {

// Rounds to nearest even and keeps subnormals while alive, whatever the caller chose
// (torch.set_flush_denormal changes the calling thread, and threads inherit it).
class ScopedFloatMode {
  public:
#if defined(__x86_64__)
    ScopedFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~ScopedFloatMode() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
    ScopedFloatMode() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
        __asm__ volatile("msr fpcr, %0" : : "r"(static_cast<uint64_t>(0)) : "memory");
    }
    ~ScopedFloatMode() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#else
    ScopedFloatMode() : saved_(0) {}
    ~ScopedFloatMode() { (void)saved_; }
#endif
    ScopedFloatMode(const ScopedFloatMode&) = delete;
    ScopedFloatMode& operator=(const ScopedFloatMode&) = delete;

  private:
#if defined(__x86_64__)
    unsigned int saved_;
#else
    uint64_t saved_;
#endif
};

}  // namespace gn

#endif  // GEMINI_FLOAT_MODE_H
