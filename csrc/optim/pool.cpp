#include "optim/pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace peftcore {
namespace optim {
namespace {

constexpr int64_t kAhead = 8;  // pages that are prefetched

}  // namespace

Pool::Pool(std::unique_ptr<Store> store, int64_t page_bytes, int64_t budget)
    : store_(std::move(store)), page_bytes_(page_bytes), budget_(budget) {
    check_budget(budget);
}

Pool::~Pool() {
    if (getpid() != process_) {
        // The copy in a forked process: it has no threads, and its resources belong to the parent.
        (void)store_.release();
        return;
    }
    for (Page& page : pages_) {
        for (const auto& transfer : {page.coming, page.going})
            if (transfer) store_->wait(*transfer);
        if (page.coming) store_->delete_frame(page.coming->frame);
        if (page.frame) store_->delete_frame(page.frame);
    }
}

void Pool::check_process() const {
    if (getpid() != process_)
        throw std::runtime_error(
            "this optimizer's state is in pages of process " + std::to_string(process_) +
            ", from which this one was forked. Make a new optimizer here and load the other's state_dict()");
}

void Pool::check_budget(int64_t budget) const {
    if (budget < page_bytes_)
        throw std::invalid_argument("the budget must hold at least one page of " +
                                    std::to_string(page_bytes_) + " bytes, found " + std::to_string(budget));
}

std::unique_lock<std::recursive_mutex> Pool::lock() {
    check_process();
    return std::unique_lock(mutex_);
}

void Pool::grow(int64_t pages) {
    const auto locked = lock();
    if (pages <= this->pages()) return;
    store_->reserve(pages);
    pages_.resize(pages);
}

void Pool::resize(int64_t budget) {
    const auto locked = lock();
    check_budget(budget);
    budget_ = budget;
    shrink(limit());
}

void Pool::evict() {
    const auto locked = lock();
    shrink(0);
}

void Pool::balance(int64_t margin) {
    const auto locked = lock();
    const int64_t target_bytes = resident_bytes() + store_->free_bytes() - margin;
    resize(std::max(page_bytes_, target_bytes));
}

void Pool::expect(std::vector<int64_t> order) {
    const auto locked = lock();
    for (size_t i = at_; i < order_.size(); ++i) {
        pages_[order_[i]].next_use = kNever;
        try {
            if (i < ahead_) settle(order_[i]);
        } catch (const std::runtime_error&) {
            // From a sweep that stopped. The next user of the page tries again, and gets the error.
        }
    }
    order_ = std::move(order);
    at_ = ahead_ = 0;
    for (size_t i = 0; i < order_.size(); ++i) pages_.at(order_[i]).next_use = int64_t(i);
}

// The least recently used page that is neither in use nor expected before position `before`; or -1.
int64_t Pool::victim(int64_t before) const {
    for (int64_t page : used_)
        if (pages_[page].pins == 0 && pages_[page].next_use > before) return page;
    return -1;
}

void* Pool::detach(int64_t page) {
    Page& p = pages_[page];
    void* frame = p.frame;
    p.frame = nullptr;
    used_.erase(p.used);
    return frame;
}

// Begins to fetch a page needed at a position of the order. False if no other page may be evicted for it.
bool Pool::fetch(int64_t page, int64_t place) {
    Page& p = pages_[page];
    if (p.going) settle(page);
    if (p.frame || p.coming) return true;
    auto transfer = std::make_shared<Transfer>();
    transfer->in = page;
    transfer->zero = !p.stored;
    if (frames_ < limit()) transfer->frame = store_->new_frame();
    if (transfer->frame) {
        peak_bytes = std::max(peak_bytes, ++frames_ * page_bytes_);
    } else {
        const int64_t leaving = victim(place);
        if (leaving < 0) return false;
        transfer->frame = detach(leaving);
        if (pages_[leaving].dirty) {
            transfer->out = leaving;
            pages_[leaving].going = transfer;
        }
    }
    p.coming = transfer;
    store_->start(transfer);
    return true;
}

void Pool::prefetch() {
    ahead_ = std::max(ahead_, at_);
    for (; ahead_ < std::min(order_.size(), at_ + kAhead); ++ahead_)
        if (!fetch(order_[ahead_], int64_t(ahead_))) return;
}

// Waits for the transfers of a page.
void Pool::settle(int64_t page) {
    for (const auto& transfer : {pages_[page].going, pages_[page].coming}) {
        if (!transfer) continue;
        const auto began = std::chrono::steady_clock::now();
        store_->wait(*transfer);
        seconds_waiting += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        finish(transfer);
    }
}

void Pool::finish(const std::shared_ptr<Transfer>& transfer) {
    const Transfer& done = *transfer;
    const auto attach = [&](int64_t page, Order::iterator before) {
        pages_[page].frame = done.frame;
        pages_[page].used = used_.insert(before, page);
    };
    const bool leaves = done.out >= 0 && pages_[done.out].going == transfer;
    const bool comes = done.in >= 0 && pages_[done.in].coming == transfer;
    if (leaves) {
        Page& p = pages_[done.out];
        p.going.reset();
        p.stored |= done.written;
        p.dirty = !done.written;
        if (done.written) bytes_out += page_bytes_;
    }
    if (comes) pages_[done.in].coming.reset();
    if (done.error.empty()) {
        if (!comes) return;
        pages_[done.in].dirty = done.zero;
        if (!done.zero) bytes_in += page_bytes_;
        attach(done.in, used_.end());
        return;
    }
    if (leaves && !done.written) {
        attach(done.out, used_.begin());
    } else if (comes) {
        store_->delete_frame(done.frame);
        --frames_;
    }
    throw std::runtime_error(done.error);
}

void Pool::shrink(int64_t frames) {
    for (size_t i = at_; i < std::min(ahead_, order_.size()); ++i) settle(order_[i]);
    while (frames_ > frames) {
        const int64_t page = victim(-1);
        if (page < 0) return;
        auto transfer = std::make_shared<Transfer>();
        transfer->frame = detach(page);
        if (pages_[page].dirty) {
            transfer->out = page;
            pages_[page].going = transfer;
            store_->start(transfer);
            settle(page);
        }
        store_->delete_frame(transfer->frame);
        --frames_;
    }
}

void* Pool::acquire(int64_t page) {
    const auto locked = lock();
    Page& p = pages_.at(page);
    if (at_ < order_.size() && order_[at_] == page) {
        p.next_use = kNever;
        ++at_;
    }
    while (!p.frame) {
        if (fetch(page, -1)) {
            settle(page);
            continue;
        }
        // All free frames are being filled with later pages: waits for one, and evicts it if necessary.
        size_t i = at_;
        while (i < order_.size() && !pages_[order_[i]].coming) ++i;
        if (i == order_.size())
            throw std::runtime_error(
                frames_ < limit() ? "there is no memory for a page of " + std::to_string(page_bytes_) +
                                        " bytes, next to " + std::to_string(frames_) +
                                        " resident ones that are in use. Free memory on the device, or use a "
                                        "smaller batch"
                                  : "every page of the budget is in use");
        settle(order_[i]);
    }
    ++p.pins;
    used_.splice(used_.end(), used_, p.used);
    try {
        prefetch();
    } catch (...) {
        --p.pins;
        throw;
    }
    return p.frame;
}

void Pool::release(int64_t page, bool dirty) {
    const auto locked = lock();
    Page& p = pages_.at(page);
    p.dirty |= dirty;
    --p.pins;
}

bool Pool::ready(int64_t page) const { return pages_[page].frame != nullptr; }

int64_t Pool::most_held() const { return std::max<int64_t>(1, limit() / 4); }

void Pool::read(int64_t page, int64_t offset, int64_t bytes, void* to) {
    const auto locked = lock();
    store_->copy_from(acquire(page), offset, bytes, to);
    release(page, false);
}

void Pool::write(int64_t page, int64_t offset, int64_t bytes, const void* from) {
    const auto locked = lock();
    store_->copy_to(acquire(page), offset, bytes, from);
    release(page, true);
}

}  // namespace optim
}  // namespace peftcore
