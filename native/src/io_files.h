// Internal: the files of an I/O engine.
#ifndef GEMINI_IO_FILES_H
#define GEMINI_IO_FILES_H

#include <unistd.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "crc32c.h"

namespace gn::io {

class FileDescriptor {
  public:
    FileDescriptor() = default;
    explicit FileDescriptor(int fd) : fd_(fd) {}
    FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
    FileDescriptor& operator=(FileDescriptor&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~FileDescriptor() {
        if (fd_ >= 0) close(fd_);
    }
    int get() const { return fd_; }

  private:
    int fd_ = -1;
};

struct File {
    FileDescriptor buffered;
    FileDescriptor direct;                      // -1: the file system refuses O_DIRECT or nobody asked for it
    int32_t flags = 0;                          // gn_io_open_flag
    bool is_direct = false;                     // cleared when the first direct transfer is refused
    int64_t num_users = 0;                      // requests not yet completed, and calls that use a descriptor
    std::unique_ptr<BlockChecksums> checksums;  // null: not verified
};

// Open a file as gn_io_open does. Return 0 or -errno; may throw.
int32_t open_file(const char* path, int32_t flags, std::unique_ptr<File>* opened);

// Block until what was written is on the device. Return 0 or -errno.
int32_t sync_file(const File& file);

// Open files by number; a number is not used twice. Not thread-safe: the engine's mutex guards it.
class FileTable {
  public:
    // Returns the file's number, or -EMFILE when all have been used; may throw.
    int32_t add(std::unique_ptr<File> file);

    // Null: there is none of this number.
    File* find(int32_t number);

    // Hand a file over, to be closed. -EBADF: there is none; -EBUSY: it is in use.
    int32_t remove(int32_t number, std::unique_ptr<File>* removed);

  private:
    std::map<int32_t, std::unique_ptr<File>> files_;
    int32_t next_number_ = 0;
};

}  // namespace gn::io

#endif  // GEMINI_IO_FILES_H
