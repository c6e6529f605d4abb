// Files: opened twice, through the page cache and past it, and known by number.
#include "io_files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "../include/gemini_native.h"

namespace gn::io {
namespace {

int open_retrying(const char* path, int flags) {
    int fd;
    do {
        fd = open(path, flags | O_CLOEXEC, 0600);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

// Open a second, direct descriptor of the file that `buffered` is; -1 in *direct if that is refused.
int32_t open_direct(const char* path, int access, int buffered, FileDescriptor* direct) {
    struct stat first;
    if (fstat(buffered, &first) != 0) return -errno;
    if (!S_ISREG(first.st_mode) && !S_ISBLK(first.st_mode)) return 0;
    FileDescriptor opened(open_retrying(path, access | O_DIRECT));
    if (opened.get() < 0) return errno == EINVAL || errno == EOPNOTSUPP ? 0 : -errno;
    struct stat second;
    if (fstat(opened.get(), &second) != 0) return -errno;
    if (first.st_dev != second.st_dev || first.st_ino != second.st_ino) return -ESTALE;
    *direct = std::move(opened);
    return 0;
}

}  // namespace

int32_t open_file(const char* path, int32_t flags, std::unique_ptr<File>* opened) {
    const bool can_read = (flags & GN_IO_OPEN_READ) != 0;
    const bool can_write = (flags & GN_IO_OPEN_WRITE) != 0;
    const int access = can_read ? (can_write ? O_RDWR : O_RDONLY) : O_WRONLY;
    int how = access;
    if ((flags & GN_IO_OPEN_CREATE) != 0) how |= O_CREAT;
    if ((flags & GN_IO_OPEN_TRUNCATE) != 0) how |= O_TRUNC;

    auto file = std::make_unique<File>();
    file->flags = flags;
    file->buffered = FileDescriptor(open_retrying(path, how));
    if (file->buffered.get() < 0) return -errno;
    if ((flags & GN_IO_OPEN_DIRECT) != 0) {
        const int32_t status = open_direct(path, access, file->buffered.get(), &file->direct);
        if (status != 0) return status;
        file->is_direct = file->direct.get() >= 0;
    }
    *opened = std::move(file);
    return 0;
}

int32_t sync_file(const File& file) {
    int rc;
    do {
        rc = fdatasync(file.buffered.get());
    } while (rc != 0 && errno == EINTR);
    return rc == 0 ? 0 : -errno;
}

int32_t FileTable::add(std::unique_ptr<File> file) {
    if (next_number_ == INT32_MAX) return -EMFILE;
    files_.emplace(next_number_, std::move(file));
    return next_number_++;
}

File* FileTable::find(int32_t number) {
    auto found = files_.find(number);
    return found == files_.end() ? nullptr : found->second.get();
}

int32_t FileTable::remove(int32_t number, std::unique_ptr<File>* removed) {
    auto found = files_.find(number);
    if (found == files_.end()) return -EBADF;
    if (found->second->num_users > 0) return -EBUSY;
    *removed = std::move(found->second);
    files_.erase(found);
    return 0;
}

}  // namespace gn::io
