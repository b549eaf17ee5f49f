// Pages of optimizer state: a budget of bytes is resident, the rest is in a store.
//
// The least recently used page is evicted. A sweep over all pages declares its order first (`expect`), so that the next
// pages are fetched, and evicted ones written, while the current one is in use. Sweeps alternate between forward and
// backward: the pages used last are then needed first, and each sweep moves only what exceeds the budget. A failed
// transfer loses nothing: a page that could not be written stays resident, one that could not be read stays in the
// store, and a repeated sweep continues where it stopped (`done`, `mark`).
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
    // Throws std::invalid_argument if the budget is less than one page.
    Pool(std::unique_ptr<Store> store, int64_t page_bytes, int64_t budget);
    ~Pool();
    Pool(const Pool&) = delete;

    // Functions that move pages call it, and throw std::runtime_error in a process forked from the pool's.
    std::unique_lock<std::recursive_mutex> lock();

    int64_t page_bytes() const { return page_bytes_; }
    int64_t budget() const { return budget_; }
    int64_t pages() const { return int64_t(pages_.size()); }
    int64_t resident_bytes() const { return frames_ * page_bytes_; }

    // Adds pages of zeros, up to `pages` in all. Throws, with nothing changed, if the store is full.
    void grow(int64_t pages);
    // Changes the budget; surplus pages are evicted at once. Throws std::invalid_argument as the constructor does.
    void resize(int64_t budget);
    // Evicts all pages that are not in use.
    void evict();
    // The budget that leaves `margin` of the memory now free; at least one page.
    void balance(int64_t margin);

    // The order in which pages will be acquired.
    void expect(std::vector<int64_t> order);
    // The page's memory, valid until it has been released as often as acquired.
    void* acquire(int64_t page);
    void release(int64_t page, bool dirty);
    // Whether `acquire` would neither wait nor evict another page.
    bool ready(int64_t page) const;
    // Number of pages that may be held at once without stopping transfers.
    int64_t most_held() const;

    // Number of the sweep that last completed a page.
    bool done(int64_t page, int64_t sweep) const { return pages_[page].sweep == sweep; }
    void mark(int64_t page, int64_t sweep) { pages_[page].sweep = sweep; }

    // Copies bytes of a page from or to ordinary memory.
    void read(int64_t page, int64_t offset, int64_t bytes, void* to);
    void write(int64_t page, int64_t offset, int64_t bytes, const void* from);

    // Totals since the pool was created.
    int64_t bytes_in = 0, bytes_out = 0, peak_bytes = 0;
    double seconds_waiting = 0;

 private:
    using Order = std::list<int64_t>;
    static constexpr int64_t kNever = INT64_MAX;

    struct Page {
        void* frame = nullptr;
        bool dirty = false;   // newer than the store's copy
        bool stored = false;  // the store has a copy
        int pins = 0;
        int64_t next_use = kNever;  // position in the expected order
        int64_t sweep = -1;
        std::shared_ptr<Transfer> coming, going;
        Order::iterator used;  // while it has a frame
    };

    void check_process() const;
    void check_budget(int64_t budget) const;
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
    size_t at_ = 0;     // next position of order_ to be acquired
    size_t ahead_ = 0;  // next position to be fetched
    const pid_t process_ = getpid();
    std::recursive_mutex mutex_;
};

}  // namespace optim
}  // namespace peftcore
