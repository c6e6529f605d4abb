// CRC-32C: the Castagnoli polynomial 0x1EDC6F41, reflected, as in RFC 3720 (appendix B.4 has test vectors).
//
// [Note: three lanes]
// The processor's instruction takes three cycles for eight bytes but can start one each cycle. A run of
// 3 x kLaneNbytes bytes is therefore taken as three lanes side by side, each but the first starting from 0.
// A CRC without its complements is linear: crc(a, xy) = zeros(crc(a, x)) ^ crc(0, y), where zeros() appends
// as many zero bytes as y is long. That map of 32 bits to 32 bits is four tables of 256.
#include "crc32c.h"

#include <errno.h>
#include <string.h>

#include <algorithm>
#include <array>

#include "gemini_native.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gn {
namespace {

constexpr uint32_t kReflectedPolynomial = 0x82F63B78;
constexpr int64_t kLaneNbytes = 1360;  // three lanes and 16 bytes are a block of BlockChecksums

using Table = std::array<uint32_t, 256>;

// bytes[k][v]: the remainder of byte v followed by k zero bytes.
// zeros[k][v]: byte k of a remainder being v, what kLaneNbytes zero bytes make of it.
struct Tables {
    std::array<Table, 8> bytes;
    std::array<Table, 4> zeros;

    Tables() {
        for (uint32_t value = 0; value < 256; ++value) {
            uint32_t crc = value;
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kReflectedPolynomial : 0);
            bytes[0][value] = crc;
        }
        for (size_t k = 1; k < bytes.size(); ++k)
            for (size_t value = 0; value < 256; ++value) bytes[k][value] = append_zero(bytes[k - 1][value]);
        for (size_t k = 0; k < zeros.size(); ++k) fill_zeros(k);
    }

    uint32_t append_zero(uint32_t crc) const { return (crc >> 8) ^ bytes[0][crc & 0xFF]; }

    uint32_t append_lane(uint32_t crc) const {
        return zeros[0][crc & 0xFF] ^ zeros[1][(crc >> 8) & 0xFF] ^ zeros[2][(crc >> 16) & 0xFF] ^
               zeros[3][crc >> 24];
    }

  private:
    void fill_zeros(size_t k) {
        zeros[k][0] = 0;
        for (size_t value = 1; value < 256; value += value) {  // the single bits, then their sums
            auto crc = static_cast<uint32_t>(value << (8 * k));
            for (int64_t i = 0; i < kLaneNbytes; ++i) crc = append_zero(crc);
            for (size_t rest = 0; rest < value; ++rest) zeros[k][value + rest] = crc ^ zeros[k][rest];
        }
    }
};

const Tables& tables() {
    static const Tables made;
    return made;
}

// Eight bytes at a time by table; works on every machine, whatever its byte order.
uint32_t crc32c_portable(uint32_t crc, const void* data, int64_t nbytes) {
    const auto& table = tables().bytes;
    const auto* next = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; nbytes >= 8; nbytes -= 8, next += 8) {
        crc = table[7][(crc ^ next[0]) & 0xFF] ^ table[6][((crc >> 8) ^ next[1]) & 0xFF] ^
              table[5][((crc >> 16) ^ next[2]) & 0xFF] ^ table[4][(crc >> 24) ^ next[3]] ^ table[3][next[4]] ^
              table[2][next[5]] ^ table[1][next[6]] ^ table[0][next[7]];
    }
    for (; nbytes > 0; --nbytes, ++next) crc = (crc >> 8) ^ table[0][(crc ^ *next) & 0xFF];
    return ~crc;
}

#if defined(__x86_64__)
#define GN_CRC_TARGET __attribute__((target("sse4.2")))
#define GN_HAVE_CRC_INSTRUCTION 1
GN_CRC_TARGET inline uint64_t step8(uint64_t crc, uint64_t word) { return __builtin_ia32_crc32di(crc, word); }
GN_CRC_TARGET inline uint32_t step1(uint32_t crc, unsigned char byte) {
    return __builtin_ia32_crc32qi(crc, byte);
}
bool has_crc_instruction() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2");
}
#elif defined(__aarch64__) && defined(__linux__)
#define GN_CRC_TARGET __attribute__((target("+crc")))
#define GN_HAVE_CRC_INSTRUCTION 1
// In assembly, because compilers declare the intrinsics only where the whole file may use them.
GN_CRC_TARGET inline uint64_t step8(uint64_t crc, uint64_t word) {
    auto out = static_cast<uint32_t>(crc);
    __asm__("crc32cx %w0, %w0, %x1" : "+r"(out) : "r"(word));
    return out;
}
GN_CRC_TARGET inline uint32_t step1(uint32_t crc, unsigned char byte) {
    __asm__("crc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(static_cast<uint32_t>(byte)));
    return crc;
}
bool has_crc_instruction() {
    constexpr unsigned long kCrc32 = 1UL << 7;  // HWCAP_CRC32
    return (getauxval(AT_HWCAP) & kCrc32) != 0;
}
#endif

#ifdef GN_HAVE_CRC_INSTRUCTION

inline uint64_t load8(const unsigned char* from) {
    uint64_t word;
    memcpy(&word, from, sizeof(word));
    return word;
}

// See [Note: three lanes].
GN_CRC_TARGET uint32_t crc32c_instruction(uint32_t crc, const void* data, int64_t nbytes) {
    const auto* next = static_cast<const unsigned char*>(data);
    uint64_t first = ~crc;
    for (; nbytes >= 3 * kLaneNbytes; nbytes -= 3 * kLaneNbytes, next += 3 * kLaneNbytes) {
        uint64_t second = 0, third = 0;
        for (int64_t i = 0; i < kLaneNbytes; i += 8) {
            first = step8(first, load8(next + i));
            second = step8(second, load8(next + kLaneNbytes + i));
            third = step8(third, load8(next + 2 * kLaneNbytes + i));
        }
        const Tables& table = tables();
        first = table.append_lane(static_cast<uint32_t>(first)) ^ second;
        first = table.append_lane(static_cast<uint32_t>(first)) ^ third;
    }
    for (; nbytes >= 8; nbytes -= 8, next += 8) first = step8(first, load8(next));
    auto rest = static_cast<uint32_t>(first);
    for (; nbytes > 0; --nbytes, ++next) rest = step1(rest, *next);
    return ~rest;
}

#endif

}  // namespace

Crc32cFunction find_crc32c(int32_t method) {
    Crc32cFunction fast = nullptr;
#ifdef GN_HAVE_CRC_INSTRUCTION
    if (has_crc_instruction()) fast = crc32c_instruction;
#endif
    if (method == GN_CRC_INSTRUCTION) return fast;
    return method == GN_CRC_AUTO && fast != nullptr ? fast : crc32c_portable;
}

// ---------------------------------------------------------------------- blocks of a file

BlockChecksums::Range BlockChecksums::range_of(int64_t nbytes, int64_t offset) const {
    const auto num_blocks = static_cast<int64_t>(crcs_.size());
    const int64_t end = offset + nbytes;
    Range range;
    range.first = offset / kBlockNbytes;
    range.end = std::min(num_blocks, (end + kBlockNbytes - 1) / kBlockNbytes);
    range.first_whole = (offset + kBlockNbytes - 1) / kBlockNbytes;
    range.end_whole = std::min(num_blocks, end / kBlockNbytes);
    return range;
}

// A checksum that happens to be 0 counts as 1, so that 0 can mean "unknown".
uint32_t BlockChecksums::checksum(const char* block) const {
    return std::max(crc32c_(0, block, kBlockNbytes), uint32_t{1});
}

void BlockChecksums::record(const char* data, int64_t nbytes, int64_t offset) {
    const Range range = range_of(nbytes, offset);
    for (int64_t block = range.first; block < range.end; ++block) {
        const bool is_whole = block >= range.first_whole && block < range.end_whole;
        crcs_[static_cast<size_t>(block)] = is_whole ? checksum(data + (block * kBlockNbytes - offset)) : 0;
    }
}

int64_t BlockChecksums::find_mismatch(const char* data, int64_t nbytes, int64_t offset) const {
    const Range range = range_of(nbytes, offset);
    for (int64_t block = range.first_whole; block < range.end_whole; ++block) {
        const uint32_t expected = crcs_[static_cast<size_t>(block)];
        const int64_t position = block * kBlockNbytes - offset;
        if (expected != 0 && checksum(data + position) != expected) return position;
    }
    return -1;
}

}  // namespace gn

int32_t gn_crc32c(uint32_t* crc, const void* data, int64_t nbytes, int32_t method) {
    if (crc == nullptr || nbytes < 0 || (data == nullptr && nbytes > 0)) return -EINVAL;
    if (method < GN_CRC_AUTO || method > GN_CRC_INSTRUCTION) return -EINVAL;
    const gn::Crc32cFunction crc32c = gn::find_crc32c(method);
    if (crc32c == nullptr) return -ENOTSUP;
    *crc = crc32c(*crc, data, nbytes);
    return 0;
}
