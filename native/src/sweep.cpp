// The memory sweep: what a kernel over the same operands costs when it does no arithmetic.
#include <errno.h>
#include <string.h>

#include <algorithm>

#include "jobs.h"

namespace gn {
namespace {

// A cache line.
struct Line {
    static constexpr int kNumWords = 8;
    static constexpr int64_t kNbytes = 64;
    uint64_t words[kNumWords];
};

// Bytes of all buffers together that one piece covers: few enough for the first-level cache, enough for the
// processor to see a stream in each buffer.
constexpr int64_t kPieceNbytes = 12 * 1024;

template <bool kIsInverted>
inline void sweep_line(char* data, size_t nbytes, Line& sums) {
    Line line = {};
    memcpy(&line, data, nbytes);
    for (int k = 0; k < Line::kNumWords; ++k) sums.words[k] ^= line.words[k];
    if (!kIsInverted) return;
    for (int k = 0; k < Line::kNumWords; ++k) line.words[k] = ~line.words[k];
    memcpy(data, &line, nbytes);
}

template <bool kIsInverted>
void sweep_bytes(char* data, int64_t nbytes, Line& sums) {
    int64_t i = 0;
    for (; i + Line::kNbytes <= nbytes; i += Line::kNbytes)
        sweep_line<kIsInverted>(data + i, Line::kNbytes, sums);
    if (i < nbytes) sweep_line<kIsInverted>(data + i, static_cast<size_t>(nbytes - i), sums);
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
    Line sums = {};
    for (int64_t piece = begin; piece < end; ++piece) {
        for (int64_t i = 0; i < num_buffers; ++i) {
            const int64_t num_lines = (buffers[i].nbytes + Line::kNbytes - 1) / Line::kNbytes;
            const int64_t share = (num_lines + num_pieces - 1) / num_pieces * Line::kNbytes;
            const int64_t first = std::min(buffers[i].nbytes, piece * share);
            const int64_t nbytes = std::min(share, buffers[i].nbytes - first);
            char* data = static_cast<char*>(buffers[i].data) + first;
            if (buffers[i].mode == GN_SWEEP_READ)
                sweep_bytes<false>(data, nbytes, sums);
            else
                sweep_bytes<true>(data, nbytes, sums);
        }
    }
    uint64_t sum = 0;
    for (const uint64_t word : sums.words) sum ^= word;
    return sum;
}

}  // namespace gn
