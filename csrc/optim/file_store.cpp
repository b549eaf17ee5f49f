#include "optim/file_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace peftcore {
namespace optim {
namespace {

constexpr int64_t kHugePage = int64_t(2) << 20;
constexpr int kPrivate = 0600;

// Bypasses the page cache where the file system can: the budget is there to avoid a second copy in memory.
int open_nameless(const std::string& directory) {
#if defined(O_TMPFILE)
    for (int direct : {O_DIRECT, 0}) {
        const int fd = open(directory.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC | direct, kPrivate);
        if (fd >= 0) return fd;
        if (errno != EINVAL && errno != EOPNOTSUPP && errno != EISDIR) return -1;
    }
#endif
    std::string name = directory + "/peftcore-XXXXXX";
    const int fd = mkostemp(name.data(), O_CLOEXEC);
    if (fd >= 0) unlink(name.c_str());
    return fd;
}

// Allocates `bytes` of the file; returns 0 or the error number.
int allocate(int fd, int64_t bytes) {
#if defined(__APPLE__)
    struct stat facts = {};
    if (fstat(fd, &facts) != 0) return errno;
    if (facts.st_size >= bytes) return 0;
    fstore_t room = {};
    room.fst_flags = F_ALLOCATEALL;
    room.fst_posmode = F_PEOFPOSMODE;
    room.fst_length = bytes - facts.st_size;
    return fcntl(fd, F_PREALLOCATE, &room) == 0 && ftruncate(fd, bytes) == 0 ? 0 : errno;
#else
    return posix_fallocate(fd, 0, bytes);
#endif
}

// The text of an error, as a string that stays valid.
const char* description(int error) {
#if defined(__GLIBC__)
    return strerrordesc_np(error);
#else
    return strerror(error);
#endif
}

class FileStore : public Store {
 public:
    FileStore(const std::string& directory, int64_t page_bytes)
        : directory_(directory), page_bytes_(page_bytes), fd_(open_nameless(directory)) {
        if (fd_ < 0)
            throw std::runtime_error("no page file can be made in '" + directory + "': " + strerror(errno) +
                                     ". Choose another: directory=...");
        thread_ = std::thread([this] { work(); });
    }

    ~FileStore() override {
        {
            const std::lock_guard locked(mutex_);
            ends_ = true;
        }
        changed_.notify_all();
        thread_.join();
        close(fd_);
    }

    void* new_frame() override {
        // Aligned to huge pages, which halve the processor's time for address translation.
        const bool huge = page_bytes_ % kHugePage == 0;
        const int64_t bytes = page_bytes_ + (huge ? kHugePage : 0);
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        if (!huge) return memory;
        char* begin = static_cast<char*>(memory);
        char* frame = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
        if (frame > begin) munmap(begin, frame - begin);
        const int64_t tail_bytes = begin + bytes - (frame + page_bytes_);
        if (tail_bytes > 0) munmap(frame + page_bytes_, tail_bytes);
#if defined(MADV_HUGEPAGE)
        madvise(frame, page_bytes_, MADV_HUGEPAGE);
#endif
        return frame;
    }

    void delete_frame(void* frame) override { munmap(frame, page_bytes_); }

    void reserve(int64_t pages) override {
        const int error = allocate(fd_, pages * page_bytes_);
        if (error == 0) return;
        struct statvfs facts = {};
        fstatvfs(fd_, &facts);
        throw std::runtime_error(
            "optimizer state needs a page file of " + std::to_string(pages * page_bytes_) + " bytes in '" +
            directory_ + "', where " + std::to_string(int64_t(facts.f_bavail) * int64_t(facts.f_frsize)) +
            " are free: " + strerror(error) + ". Free space there or choose another place: directory=...");
    }

    void start(const std::shared_ptr<Transfer>& transfer) override {
        {
            const std::lock_guard locked(mutex_);
            queue_.push_back(transfer);
        }
        changed_.notify_all();
    }

    void wait(Transfer& transfer) override {
        std::unique_lock locked(mutex_);
        changed_.wait(locked, [&] { return transfer.done; });
    }

    void copy_from(const void* frame, int64_t offset, int64_t bytes, void* to) override {
        memcpy(to, static_cast<const char*>(frame) + offset, bytes);
    }

    void copy_to(void* frame, int64_t offset, int64_t bytes, const void* from) override {
        memcpy(static_cast<char*>(frame) + offset, from, bytes);
    }

    int64_t free_bytes() override {
        std::ifstream facts("/proc/meminfo");
        std::string name;
        for (int64_t kilobytes; facts >> name >> kilobytes; facts.ignore(256, '\n'))
            if (name == "MemAvailable:") return kilobytes * 1024;
        return INT64_MAX / 2;
    }

    std::string place() const override { return directory_; }

 private:
    void work() {
        std::unique_lock locked(mutex_);
        for (;;) {
            changed_.wait(locked, [&] { return ends_ || !queue_.empty(); });
            if (queue_.empty()) return;
            const std::shared_ptr<Transfer> transfer = queue_.front();
            queue_.pop_front();
            locked.unlock();
            move(*transfer);
            locked.lock();
            transfer->done = true;
            changed_.notify_all();
        }
    }

    void move(Transfer& transfer) {
        char* frame = static_cast<char*>(transfer.frame);
        if (transfer.out >= 0) {
            const char* why = all_bytes(transfer.out, [&](int64_t done, int64_t at) {
                return pwrite(fd_, frame + done, page_bytes_ - done, at);
            });
            transfer.written = why == nullptr;
            if (why != nullptr) {
                transfer.error = "the page file in '" + directory_ + "' cannot be written: " + why +
                                 ". Nothing is lost: the page stays in memory. Call step() again when it can";
                return;
            }
        }
        if (transfer.in < 0) return;
        if (transfer.zero) {
            memset(frame, 0, page_bytes_);
            return;
        }
        const char* why = all_bytes(transfer.in, [&](int64_t done, int64_t at) {
            return pread(fd_, frame + done, page_bytes_ - done, at);
        });
        if (why != nullptr)
            transfer.error = "the page file in '" + directory_ + "' cannot be read: " + why +
                             ". Pages read before are kept, the rest is in the file. Call step() again when "
                             "it can be read";
    }

    // Repeats the call until the whole page is transferred; returns nullptr or the error.
    template <typename Call>
    const char* all_bytes(int64_t page, Call call) {
        for (int64_t done = 0; done < page_bytes_;) {
            const ssize_t count = call(done, page * page_bytes_ + done);
            if (count == 0) return "the file is too short";
            if (count < 0 && errno != EINTR) return description(errno);
            done += std::max<ssize_t>(count, 0);
        }
        return nullptr;
    }

    const std::string directory_;
    const int64_t page_bytes_;
    const int fd_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::shared_ptr<Transfer>> queue_;
    bool ends_ = false;
    std::thread thread_;
};

}  // namespace

std::unique_ptr<Store> make_file_store(const std::string& directory, int64_t page_bytes) {
    return std::make_unique<FileStore>(directory, page_bytes);
}

}  // namespace optim
}  // namespace peftcore
