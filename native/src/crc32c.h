// Internal: CRC-32C of bytes, and of the blocks of a file.
#ifndef GEMINI_CRC32C_H
#define GEMINI_CRC32C_H

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace gn {

// Continue a CRC-32C (the value, not its complement) over more bytes; 0 starts one.
using Crc32cFunction = uint32_t (*)(uint32_t crc, const void* data, int64_t nbytes);

// The function of a gn_crc_method; null where the processor or the build lacks it.
Crc32cFunction find_crc32c(int32_t method);

// What the blocks of a file held when they were last written through us. Not thread-safe.
//
// Only whole blocks are known: a write that covers part of a block makes it unknown, and an unknown block
// differs from nothing.
class BlockChecksums {
  public:
    static constexpr int64_t kBlockNbytes = 4096;

    // Of the first `num_blocks` blocks of the file; may throw std::bad_alloc.
    explicit BlockChecksums(int64_t num_blocks) : crcs_(static_cast<size_t>(num_blocks)) {}

    // The file is about to hold `data` from `offset` on.
    void record(const char* data, int64_t nbytes, int64_t offset);

    // Bytes of `data`, read from `offset` on, before the first block that differs; -1 if none does.
    int64_t find_mismatch(const char* data, int64_t nbytes, int64_t offset) const;

  private:
    // Blocks that [offset, offset + nbytes) covers wholly, and those it touches.
    struct Range {
        int64_t first_whole, end_whole, first, end;
    };
    Range range_of(int64_t nbytes, int64_t offset) const;
    uint32_t checksum(const char* block) const;

    std::vector<uint32_t> crcs_;  // 0: unknown
    Crc32cFunction crc32c_ = find_crc32c(0);
};

}  // namespace gn

#endif  // GEMINI_CRC32C_H
