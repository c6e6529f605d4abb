// Internal: what the blocking functions and the worker pool share. A job is checked once, then run in pieces.
#ifndef GEMINI_JOBS_H
#define GEMINI_JOBS_H

#include <stdint.h>

#include "kernels.h"

namespace gn {

// 0, -EINVAL or -ENOTSUP, and the kernels to run with.
int32_t check_adam(const gn_adam_args* args, const Kernels** kernels);
int32_t check_grad(const gn_grad_args* args, const Kernels** kernels);

// Whether everything is updated where it is.
bool is_in_place(const gn_adam_args& args);

// Update the elements [begin, end) of a checked job.
void run_adam(const Kernels& kernels, const gn_adam_args& args, int64_t begin, int64_t end);

// Bytes per element of working and master, by gn_state_format.
inline int64_t working_nbytes(int32_t format) { return format == GN_FORMAT_F32 ? 4 : 2; }
inline int64_t master_nbytes(int32_t format) {
    return format == GN_FORMAT_SPLIT_BF16 ? 2 : format == GN_FORMAT_F16_MASTER ? 4 : 0;
}

int32_t check_journal(const gn_adam_journal* journal, const gn_adam_args& args, int32_t num_threads);

// As run_adam, block by block with a journal; begin is a multiple of GN_JOURNAL_BLOCK_NUMEL, end is too or is
// args.numel. `worker` is the number of the calling thread, whose scratch is used.
void run_adam_journalled(const Kernels& kernels, const gn_adam_args& args, const gn_adam_journal& journal,
                         int32_t worker, int64_t begin, int64_t end);

// Number of leaves of the sum-of-squares tree.
inline int64_t num_sumsq_blocks(int64_t numel) { return (numel + kSumsqBlockNumel - 1) / kSumsqBlockNumel; }

// Store or add the elements [begin, end) of a checked job; begin is a multiple of kSumsqBlockNumel, end is
// too or is numel. Writes the block sums from block_sums[begin / kSumsqBlockNumel] on; null: not wanted.
void run_grad(const Kernels& kernels, const gn_grad_args& args, int64_t begin, int64_t end,
              double* block_sums);

// Smallest power of two that is >= count and >= 1.
int64_t padded_count(int64_t count);

// Reduce padded_count(num_blocks) sums, those past num_blocks being zero; overwrites them.
double reduce_block_sums(double* block_sums, int64_t num_blocks);

int32_t check_sum(const gn_sum_args* args, const Kernels** kernels);

// Add the elements [begin, end) of a checked job.
void run_sum(const Kernels& kernels, const gn_sum_args& args, int64_t begin, int64_t end);

int32_t check_sweep(const gn_sweep_buffer* buffers, int64_t num_buffers);

// A checked sweep is cut into pieces that each take their share of every buffer.
int64_t num_sweep_pieces(const gn_sweep_buffer* buffers, int64_t num_buffers);

// Sweep the pieces [begin, end); returns their part of the checksum, to be combined by XOR.
uint64_t run_sweep(const gn_sweep_buffer* buffers, int64_t num_buffers, int64_t begin, int64_t end);

}  // namespace gn

#endif  // GEMINI_JOBS_H
