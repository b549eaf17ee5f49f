// Storage of pages, resident or not. A pool decides which pages move; a store moves them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace peftcore {
namespace optim {

// A transfer of one frame: `out` is written to the store, then `in` is read from it. -1: no page. If writing fails,
// `in` is not read, and the frame still holds `out`.
struct Transfer {
    void* frame = nullptr;
    int64_t out = -1, in = -1;
    bool zero = false;  // `in` was never written: zeros
    // Set when it is done:
    bool done = false, written = false;
    std::string error;
    std::shared_ptr<void> event;  // the store's
};

class Store {
 public:
    virtual ~Store() = default;
    // Resident memory of one page, or nullptr if there is none.
    virtual void* new_frame() = 0;
    virtual void delete_frame(void* frame) = 0;
    // Makes space for pages 0 to `pages` - 1; throws std::runtime_error if it cannot.
    virtual void reserve(int64_t pages) = 0;
    // Begins a transfer; transfers of one page run in the order in which they begin. Never throws, as the pool has
    // already recorded the transfer: failures are reported in `error`.
    virtual void start(const std::shared_ptr<Transfer>& transfer) = 0;
    // Returns when the frame may be used: at once on a device whose stream waits instead.
    virtual void wait(Transfer& transfer) = 0;
    // Copies between ordinary memory and a frame.
    virtual void copy_from(const void* frame, int64_t offset, int64_t bytes, void* to) = 0;
    virtual void copy_to(void* frame, int64_t offset, int64_t bytes, const void* from) = 0;
    // Memory that is free for more frames.
    virtual int64_t free_bytes() = 0;
    // Where pages that are not resident are stored, for messages.
    virtual std::string place() const = 0;
};

}  // namespace optim
}  // namespace peftcore
