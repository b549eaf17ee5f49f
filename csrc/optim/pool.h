// Pages of optimizer state, of which a budget of bytes is resident and the rest lies in a store.
//
// The least recently used page leaves. A sweep over all pages says its order first (`expect`), so the pages
// that come next are fetched, and those that make room written, while the current one is in use. Sweeps go
// forward and backward by turns: then the pages used last are those needed first, and each sweep moves only
// what exceeds the budget. A failed transfer loses nothing: a page that could not be written stays resident,
// one that could not be read stays in the store, and a sweep that is repeated goes on where it stopped
// (`done`, `mark`).
#pragma once

#include <unistd.h>

#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "optim/store.h"

namespace peftcore {
namespace optim {

class Pool {
 public:
    // Throws std::invalid_argument if the budget does not hold one page.
    Pool(std::unique_ptr<Store> store, int64_t page_bytes, int64_t budget);
    ~Pool();
    Pool(const Pool&) = delete;

    // Everything below throws std::runtime_error in a process forked from the pool's.
    std::unique_lock<std::recursive_mutex> lock();

    int64_t page_bytes() const { return page_bytes_; }
    int64_t budget() const { return budget_; }
    int64_t pages() const { return int64_t(pages_.size()); }
    int64_t resident_bytes() const { return frames_ * page_bytes_; }

    // Adds pages of zeros, up to `pages` in all. Throws if the store has no room; then nothing has changed.
    void grow(int64_t pages);
    // Another budget; pages leave at once.
    void resize(int64_t budget);
    // All pages that are not in use leave.
    void evict();
    // The budget that leaves `margin` bytes of memory free, given what is free now; at least a page.
    void balance(int64_t margin);

    // The order in which pages will be acquired.
    void expect(std::vector<int64_t> order);
    // The page's memory, until it is released as often as it was acquired.
    void* acquire(int64_t page);
    void release(int64_t page, bool dirty);
    // Whether `acquire` would neither wait nor make another page leave.
    bool ready(int64_t page) const;
    // How many pages may be held at once, so that transfers go on beside.
    int64_t most_held() const;

    // Which sweep last completed a page.
    bool done(int64_t page, int64_t sweep) const { return pages_[page].sweep == sweep; }
    void mark(int64_t page, int64_t sweep) { pages_[page].sweep = sweep; }

    // Bytes of a page, copied from or to ordinary memory.
    void read(int64_t page, int64_t offset, int64_t bytes, void* to);
    void write(int64_t page, int64_t offset, int64_t bytes, const void* from);

    // Since the pool was made.
    int64_t bytes_in = 0, bytes_out = 0, peak_bytes = 0;
    double seconds_waiting = 0;

 private:
    using Order = std::list<int64_t>;
    static constexpr int64_t kNever = INT64_MAX;

    struct Page {
        void* frame = nullptr;
        bool dirty = false, stored = false;  // newer than the store's copy; there is one
        int pins = 0;
        int64_t next_use = kNever;  // place in the expected order
        int64_t sweep = -1;
        std::shared_ptr<Transfer> coming, going;
        Order::iterator used;  // while it has a frame
    };

    void check_process() const;
    int64_t limit() const { return std::max<int64_t>(1, budget_ / page_bytes_); }
    int64_t victim(int64_t before) const;
    void* detach(int64_t page);
    bool fetch(int64_t page, int64_t place);
    void prefetch();
    void settle(int64_t page);
    void finish(const std::shared_ptr<Transfer>& transfer);
    void shrink(int64_t frames);

    std::unique_ptr<Store> store_;
    const int64_t page_bytes_;
    int64_t budget_;
    int64_t frames_ = 0;
    std::vector<Page> pages_;
    Order used_;  // resident pages, the least recently used first
    std::vector<int64_t> order_;
    size_t at_ = 0;     // the next place of order_ to be acquired
    size_t ahead_ = 0;  // and to be fetched
    const pid_t process_ = getpid();
    std::recursive_mutex mutex_;
};

}  // namespace optim
}  // namespace peftcore
