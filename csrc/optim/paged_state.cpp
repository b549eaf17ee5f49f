#include "optim/paged_state.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

namespace peftcore {
namespace optim {
namespace {

constexpr int64_t kMostTogether = 16;  // pages of one update, so that threads start less often

std::mutex registry_mutex;
std::map<int64_t, std::weak_ptr<PagedState>> registry;
int64_t next_number = 0;

// `count` elements of a segment from `first` on, a multiple of 256; its state is not set.
Segment part_of(const Segment& whole, int64_t first, int64_t count) {
    Segment part = whole;
    part.param = static_cast<char*>(whole.param) + first * itemsize(whole.param_dtype);
    part.grad = static_cast<const char*>(whole.grad) + first * itemsize(whole.grad_dtype);
    part.first = first;
    part.count = count;
    return part;
}

}  // namespace

PagedState::PagedState(std::string_view rule, std::unique_ptr<Store> store, int64_t page_bytes,
                       int64_t budget)
    : pool(std::move(store), page_bytes, budget),
      rule_(rule_named(rule, "paged state")),
      page_blocks_(page_bytes / rule_.block_bytes()) {
    int64_t offset = 0;
    for (const Plane& plane : rule_.planes) {
        plane_offsets_.push_back(offset);
        offset += page_blocks_ * plane.block_bytes;
    }
}

int64_t PagedState::allocate(int64_t elements) {
    const auto locked = pool.lock();
    const Slot* last = slots_.empty() ? nullptr : &slots_.back();
    const int64_t first = last == nullptr ? 0 : last->first_block + blocks_of(last->elements);
    pool.grow(ceil_div(first + blocks_of(elements), page_blocks_));
    slots_.push_back({first, elements});
    return int64_t(slots_.size()) - 1;
}

// `copy(page, offset in the page, bytes, offset in the plane)` for each page with blocks of a slot.
template <typename Copy>
void PagedState::for_each_page(int64_t slot, int64_t plane, Copy copy) {
    const auto locked = pool.lock();
    const Slot& place = slots_.at(slot);
    const int64_t block_bytes = rule_.planes.at(plane).block_bytes, total = blocks_of(place.elements);
    for (int64_t done = 0; done < total;) {
        const int64_t page = (place.first_block + done) / page_blocks_;
        const int64_t block = (place.first_block + done) % page_blocks_;
        const int64_t count = std::min(total - done, page_blocks_ - block);
        copy(page, plane_offsets_[plane] + block * block_bytes, count * block_bytes, done * block_bytes);
        done += count;
    }
}

void PagedState::check_size(int64_t slot, int64_t plane, int64_t bytes) {
    const auto locked = pool.lock();
    const int64_t expected = blocks_of(slots_.at(slot).elements) * rule_.planes.at(plane).block_bytes;
    if (bytes != expected)
        throw std::invalid_argument("plane " + std::to_string(plane) + " of slot " + std::to_string(slot) +
                                    " has " + std::to_string(expected) + " bytes, the memory " +
                                    std::to_string(bytes));
}

void PagedState::read(int64_t slot, int64_t plane, void* to, int64_t bytes) {
    check_size(slot, plane, bytes);
    for_each_page(slot, plane, [&](int64_t page, int64_t offset, int64_t bytes, int64_t done) {
        pool.read(page, offset, bytes, static_cast<char*>(to) + done);
    });
}

void PagedState::write(int64_t slot, int64_t plane, const void* from, int64_t bytes) {
    check_size(slot, plane, bytes);
    for_each_page(slot, plane, [&](int64_t page, int64_t offset, int64_t bytes, int64_t done) {
        pool.write(page, offset, bytes, static_cast<const char*>(from) + done);
    });
}

void PagedState::clear(int64_t slot) {
    const std::vector<char> zeros(pool.page_bytes());
    for (size_t plane = 0; plane < rule_.planes.size(); ++plane)
        for_each_page(slot, int64_t(plane), [&](int64_t page, int64_t offset, int64_t bytes, int64_t) {
            pool.write(page, offset, bytes, zeros.data());
        });
}

std::vector<PagedState::Part> PagedState::parts_by_page(const Step& step, at::IntArrayRef slots,
                                                        const char* op) {
    TORCH_CHECK_VALUE(step.rule.number == rule_.number, op, ": the state in these pages is of another rule");
    TORCH_CHECK_VALUE(slots.size() == step.segments.size(), op, ": ", step.segments.size(),
                      " params need as many slots, found ", slots.size());
    ++calls_;
    std::vector<Part> parts;
    for (size_t i = 0; i < step.segments.size(); ++i) {
        const Segment& whole = step.segments[i];
        TORCH_CHECK_VALUE(slots[i] >= 0 && slots[i] < int64_t(slots_.size()), op, ": slot ", slots[i], " of ",
                          slots_.size());
        Slot& slot = slots_[slots[i]];
        TORCH_CHECK_VALUE(slot.call != calls_, op, ": slot ", slots[i], " is given for two parameters");
        slot.call = calls_;
        TORCH_CHECK_VALUE(slot.elements == whole.count, op, ": slot ", slots[i], " has the state of ",
                          slot.elements, " elements, its parameter has ", whole.count);
        const int64_t last = slot.first_block + blocks_of(slot.elements);
        for (int64_t block = slot.first_block; block < last;) {
            const int64_t page = block / page_blocks_, end = std::min(last, (page + 1) * page_blocks_);
            const int64_t first = (block - slot.first_block) * kBlock;
            const int64_t past_end = std::min((end - slot.first_block) * kBlock, whole.count);
            Segment part = part_of(whole, first, past_end - first);
            for (size_t plane = 0; plane < rule_.planes.size(); ++plane)
                part.state[plane] = reinterpret_cast<void*>(
                    plane_offsets_[plane] + block % page_blocks_ * rule_.planes[plane].block_bytes);
            parts.push_back({page, part});
            block = end;
        }
    }
    return parts;
}

void PagedState::step(const Step& step, at::IntArrayRef slots, int64_t sweep, const Update& update,
                      const char* op) {
    TORCH_CHECK_VALUE(sweep >= 0, op, ": sweep must not be negative, found ", sweep);
    const auto locked = pool.lock();
    std::vector<Part> parts = parts_by_page(step, slots, op);
    const bool backward = sweep % 2 != 0;
    std::stable_sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) {
        return backward ? a.page > b.page : a.page < b.page;
    });
    std::vector<int64_t> order;
    for (const Part& part : parts)
        if ((order.empty() || order.back() != part.page) && !pool.done(part.page, sweep))
            order.push_back(part.page);
    pool.expect(order);

    // If no page has to move, all are updated together. Reading a page from disk takes longer than one thread's update:
    // other threads would only spin.
    const bool all_ready =
        std::all_of(order.begin(), order.end(), [&](int64_t page) { return pool.ready(page); });
    const size_t together = all_ready ? order.size() : size_t(std::min(pool.most_held(), kMostTogether));
    const int64_t blocks_per_task = all_ready ? kBlocksPerTask : page_blocks_;
    std::vector<Segment> segments;
    std::vector<int64_t> held;
    const auto update_held = [&] {
        update(step, segments, blocks_per_task);
        for (int64_t page : held) {
            pool.mark(page, sweep);
            pool.release(page, true);
        }
        segments.clear();
        held.clear();
    };
    try {
        for (size_t i = 0; i < parts.size();) {
            const int64_t page = parts[i].page;
            if (pool.done(page, sweep)) {
                ++i;
                continue;
            }
            if (!held.empty() && (held.size() >= together || !pool.ready(page))) update_held();
            char* frame = static_cast<char*>(pool.acquire(page));
            held.push_back(page);
            for (; i < parts.size() && parts[i].page == page; ++i) {
                segments.push_back(parts[i].segment);
                for (size_t plane = 0; plane < rule_.planes.size(); ++plane) {
                    void*& state = segments.back().state[plane];
                    state = frame + reinterpret_cast<intptr_t>(state);
                }
            }
        }
        if (!held.empty()) update_held();
    } catch (...) {
        for (int64_t page : held) pool.release(page, false);
        throw;
    }
}

int64_t register_state(const std::shared_ptr<PagedState>& state) {
    const std::lock_guard locked(registry_mutex);
    std::erase_if(registry, [](const auto& entry) { return entry.second.expired(); });
    registry[next_number] = state;
    return next_number++;
}

std::shared_ptr<PagedState> state_of(int64_t number, const char* op) {
    const std::lock_guard locked(registry_mutex);
    const auto match = registry.find(number);
    std::shared_ptr<PagedState> state = match == registry.end() ? nullptr : match->second.lock();
    TORCH_CHECK_VALUE(state != nullptr, op, ": no paged state has the number ", number);
    return state;
}

}  // namespace optim
}  // namespace peftcore
