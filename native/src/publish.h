// Internal: stores in memory that outlives the process, in an order that its end cannot change.
//
// A process ends between two instructions of each of its threads, and what a thread has stored by then is in
// the memory's pages, as the processor's caches are coherent. So it is the compiler that must not move
// stores.
#ifndef GEMINI_PUBLISH_H
#define GEMINI_PUBLISH_H

#include <atomic>

namespace gn {

// Store `value` at once, after everything before this call and before everything after it.
template <class Word>
inline void publish(Word* place, Word value) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    __atomic_store_n(place, value, __ATOMIC_RELEASE);
    std::atomic_signal_fence(std::memory_order_seq_cst);
}

}  // namespace gn

#endif  // GEMINI_PUBLISH_H
