// The memory sweep: what a kernel over the same operands costs when it does no arithmetic.
#include <errno.h>
#include <string.h>

#include <algorithm>

#include "jobs.h"

namespace gn {
namespace {

constexpr int64_t kLineNbytes = 64;

// Bytes of all buffers together that one piece covers. Up to twice as many are as fast; with four times as
// many a core moves a quarter less.
constexpr int64_t kPieceNbytes = 3584;

// The vector that every processor of the instruction sets here has, at any address.
typedef uint64_t Words __attribute__((vector_size(16), aligned(1), may_alias));

template <bool kIsInverted>
inline Words sweep_line(void* line) {
    Words* words = static_cast<Words*>(line);
    const Words a = words[0], b = words[1], c = words[2], d = words[3];
    if (kIsInverted) {
        words[0] = ~a;
        words[1] = ~b;
        words[2] = ~c;
        words[3] = ~d;
    }
    return (a ^ b) ^ (c ^ d);
}

template <bool kIsInverted>
uint64_t sweep_bytes(char* data, int64_t nbytes) {
    Words sum = {};
    int64_t i = 0;
    for (; i + kLineNbytes <= nbytes; i += kLineNbytes) sum ^= sweep_line<kIsInverted>(data + i);
    if (i < nbytes) {
        char line[kLineNbytes] = {};
        memcpy(line, data + i, static_cast<size_t>(nbytes - i));
        sum ^= sweep_line<kIsInverted>(line);
        if (kIsInverted) memcpy(data + i, line, static_cast<size_t>(nbytes - i));
    }
    return sum[0] ^ sum[1];
}

}  // namespace

int32_t check_sweep(const gn_sweep_buffer* buffers, int64_t num_buffers) {
    if (num_buffers < 0 || (num_buffers > 0 && !buffers)) return -EINVAL;
    for (int64_t i = 0; i < num_buffers; ++i) {
        const gn_sweep_buffer& buffer = buffers[i];
        if (buffer.nbytes < 0 || (buffer.nbytes > 0 && !buffer.data)) return -EINVAL;
        if (buffer.mode != GN_SWEEP_READ && buffer.mode != GN_SWEEP_INVERT) return -EINVAL;
    }
    return 0;
}

int64_t num_sweep_pieces(const gn_sweep_buffer* buffers, int64_t num_buffers) {
    int64_t num_pieces = 0;
    for (int64_t i = 0; i < num_buffers; ++i) num_pieces += buffers[i].nbytes / kPieceNbytes + 1;
    return num_pieces;
}

uint64_t run_sweep(const gn_sweep_buffer* buffers, int64_t num_buffers, int64_t begin, int64_t end) {
    const int64_t num_pieces = num_sweep_pieces(buffers, num_buffers);
    uint64_t sum = 0;
    for (int64_t piece = begin; piece < end; ++piece) {
        for (int64_t i = 0; i < num_buffers; ++i) {
            const int64_t num_lines = (buffers[i].nbytes + kLineNbytes - 1) / kLineNbytes;
            const int64_t share = (num_lines + num_pieces - 1) / num_pieces * kLineNbytes;
            const int64_t first = std::min(buffers[i].nbytes, piece * share);
            const int64_t nbytes = std::min(share, buffers[i].nbytes - first);
            char* data = static_cast<char*>(buffers[i].data) + first;
            sum ^= buffers[i].mode == GN_SWEEP_READ ? sweep_bytes<false>(data, nbytes)
                                                    : sweep_bytes<true>(data, nbytes);
        }
    }
    return sum;
}

}  // namespace gn
