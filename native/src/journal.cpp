// Adam that the end of the process may interrupt: see gn_adam_journal.
#include <errno.h>
#include <string.h>

#include <algorithm>

#include "float_mode.h"
#include "jobs.h"
#include "publish.h"

namespace gn {
namespace {

constexpr int32_t kNoStop = 0;

// A copy is bound by memory and an update by arithmetic. So that they overlap, a block is updated in pieces
// of this length, and before each one as much of the next block is asked for.
constexpr int64_t kPieceNumel = 128;
constexpr int64_t kCacheLineNbytes = 64;

void prefetch(const void* values, int64_t itemsize, int64_t begin, int64_t end) {
    if (!values) return;
    const char* const last = static_cast<const char*>(values) + end * itemsize;
    for (const char* line = static_cast<const char*>(values) + begin * itemsize; line < last;
         line += kCacheLineNbytes)
        __builtin_prefetch(line, 0, 2);
}

void update_pieces(const Kernels& kernels, const gn_adam_args& args, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece += kPieceNumel) {
        const int64_t next = std::min(args.numel, piece + GN_JOURNAL_BLOCK_NUMEL);
        const int64_t next_end = std::min(args.numel, next + kPieceNumel);
        prefetch(args.working, working_nbytes(args.format), next, next_end);
        prefetch(args.master, master_nbytes(args.format), next, next_end);
        prefetch(args.momentum, 4, next, next_end);
        prefetch(args.variance, 4, next, next_end);
        prefetch(args.grad, dtype_nbytes(args.grad_dtype), next, next_end);
        run_adam(kernels, args, piece, std::min(end, piece + kPieceNumel));
    }
}

// Copy what an update of the elements [begin, end) overwrites; the reader of the image knows the lengths.
void copy_image(char* image, const gn_adam_args& args, int64_t begin, int64_t end) {
    const void* sources[] = {args.working, args.format == GN_FORMAT_F32 ? nullptr : args.master,
                             args.momentum, args.variance};
    const int64_t itemsizes[] = {working_nbytes(args.format), master_nbytes(args.format), 4, 4};
    for (int part = 0; part < 4; ++part) {
        if (!sources[part]) continue;
        const int64_t nbytes = (end - begin) * itemsizes[part];
        memcpy(image, static_cast<const char*>(sources[part]) + begin * itemsizes[part],
               static_cast<size_t>(nbytes));
        image += nbytes;
    }
}

void update_block(const Kernels& kernels, const gn_adam_args& args, const gn_adam_journal& journal,
                  int32_t worker, int64_t block, int32_t stop) {
    uint32_t* done = journal.done + block;
    if (*done == journal.sequence) return;
    const int64_t begin = block * GN_JOURNAL_BLOCK_NUMEL;
    const int64_t end = std::min(args.numel, begin + GN_JOURNAL_BLOCK_NUMEL);
    char* scratch = static_cast<char*>(journal.scratches) + int64_t{worker} * GN_JOURNAL_SCRATCH_NBYTES;
    const uint64_t number = journal.first_block + static_cast<uint64_t>(block);
    copy_image(scratch + GN_JOURNAL_IMAGE_OFFSET, args, begin, end);
    if (stop == GN_STOP_COPIED) return;
    publish(reinterpret_cast<uint64_t*>(scratch), uint64_t{journal.sequence} << 32 | number);
    if (stop == GN_STOP_NOTED) return;
    update_pieces(kernels, args, begin, stop == GN_STOP_UPDATED ? (begin + end) / 2 : end);
    if (stop == GN_STOP_UPDATED || stop == GN_STOP_WHOLE) return;
    publish(done, journal.sequence);
}

}  // namespace

int32_t check_journal(const gn_adam_journal* journal, const gn_adam_args& args, int32_t num_threads) {
    if (!journal || journal->sequence == 0 || journal->num_scratches < num_threads) return -EINVAL;
    if (!journal->scratches || (args.numel > 0 && !journal->done) || !is_in_place(args)) return -EINVAL;
    return 0;
}

void run_adam_journalled(const Kernels& kernels, const gn_adam_args& args, const gn_adam_journal& journal,
                         int32_t worker, int64_t begin, int64_t end) {
    for (int64_t block = begin / GN_JOURNAL_BLOCK_NUMEL; block * GN_JOURNAL_BLOCK_NUMEL < end; ++block)
        update_block(kernels, args, journal, worker, block, kNoStop);
}

}  // namespace gn

int32_t gn_adam_update_partly(const gn_adam_args* args, const gn_adam_journal* journal, int64_t block,
                              int32_t stop) {
    const gn::Kernels* kernels = nullptr;
    if (const int32_t status = gn::check_adam(args, &kernels)) return status;
    if (const int32_t status = gn::check_journal(journal, *args, 1)) return status;
    if (stop < GN_STOP_COPIED || stop > GN_STOP_WHOLE || block < 0) return -EINVAL;
    if (block * GN_JOURNAL_BLOCK_NUMEL >= args->numel) return -EINVAL;
    const gn::ScopedFloatMode float_mode;
    gn::run_adam_journalled(*kernels, *args, *journal, 0, 0, block * GN_JOURNAL_BLOCK_NUMEL);
    gn::update_block(*kernels, *args, *journal, 0, block, stop);
    return 0;
}
