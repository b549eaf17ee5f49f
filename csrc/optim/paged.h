// A step over state in a pool: page by page, in the order that moves least.
//
// State of a parameter begins at a block of 256 elements, its slot; `page_blocks` blocks make a page, in
// which the planes of the rule lie one after another.
#pragma once

#include <algorithm>
#include <memory>

#include "optim/arguments.h"
#include "optim/pool.h"

namespace peftcore {
namespace optim {

constexpr int64_t kMostTogether = 16;  // pages of one call of the kernels, so that threads start less often

// Pools by number, for operators.
int64_t register_pool(const std::shared_ptr<Pool>& pool);
std::shared_ptr<Pool> pool_of(int64_t number, const char* op);

inline int64_t page_blocks(Rule rule, int64_t page_bytes) { return page_bytes / planes_of(rule).total(); }

// `run(segments, rests)` updates them; it is called for some pages at a time, which are resident until it
// returns, and `rests` says that no page moves.
template <typename Run>
void sweep_pages(Pool& pool, const Step& step, at::IntArrayRef slots, int64_t sweep, bool backward,
                 const char* op, Run run) {
    TORCH_CHECK_VALUE(slots.size() == step.segments.size(), op, ": ", step.segments.size(),
                      " params need as many slots, found ", slots.size());
    TORCH_CHECK_VALUE(sweep >= 0, op, ": sweep must not be negative, found ", sweep);
    const auto locked = pool.lock();
    const Planes planes = planes_of(step.rule);
    const int64_t per_page = page_blocks(step.rule, pool.page_bytes());

    std::vector<std::pair<int64_t, Segment>> parts;  // by page
    for (size_t i = 0; i < step.segments.size(); ++i) {
        const Segment& whole = step.segments[i];
        const int64_t blocks = blocks_of(whole.count), room = pool.pages() * per_page;
        TORCH_CHECK_VALUE(slots[i] >= 0 && blocks <= room && slots[i] <= room - blocks, op, ": slot ",
                          slots[i], " and ", blocks, " blocks do not fit into ", pool.pages(), " pages");
        const int64_t last = slots[i] + blocks;
        for (int64_t block = slots[i]; block < last;) {
            const int64_t page = block / per_page, end = std::min(last, (page + 1) * per_page);
            const int64_t first = (block - slots[i]) * kBlock;
            Segment part = whole;
            part.param =
                static_cast<char*>(whole.param) + first * (whole.param_dtype == Dtype::kFloat ? 4 : 2);
            part.grad =
                static_cast<const char*>(whole.grad) + first * (whole.grad_dtype == Dtype::kFloat ? 4 : 2);
            part.first = first;
            part.count = std::min((end - slots[i]) * kBlock, whole.count) - first;
            int64_t offset = 0;  // of the plane; the page's address comes later
            for (int plane = 0; plane < planes.count; ++plane) {
                part.state[plane] =
                    reinterpret_cast<void*>(offset + (block % per_page) * planes.bytes[plane]);
                offset += per_page * planes.bytes[plane];
            }
            parts.emplace_back(page, part);
            block = end;
        }
    }
    std::stable_sort(parts.begin(), parts.end(), [&](const auto& a, const auto& b) {
        return backward ? a.first > b.first : a.first < b.first;
    });
    std::vector<int64_t> order;
    for (const auto& part : parts)
        if ((order.empty() || order.back() != part.first) && !pool.done(part.first, sweep))
            order.push_back(part.first);
    pool.expect(order);

    // Where nothing has to move, all pages go together.
    const bool rests =
        std::all_of(order.begin(), order.end(), [&](int64_t page) { return pool.ready(page); });
    const size_t together = rests ? order.size() : size_t(std::min(pool.hold(), kMostTogether));
    std::vector<Segment> segments;
    std::vector<int64_t> held;
    const auto finish = [&] {
        run(segments, rests);
        for (int64_t page : held) {
            pool.mark(page, sweep);
            pool.release(page, true);
        }
        segments.clear();
        held.clear();
    };
    try {
        for (size_t i = 0; i < parts.size();) {
            const int64_t page = parts[i].first;
            if (pool.done(page, sweep)) {
                ++i;
                continue;
            }
            if (!held.empty() && (held.size() >= together || !pool.ready(page))) finish();
            char* frame = static_cast<char*>(pool.acquire(page));
            held.push_back(page);
            for (; i < parts.size() && parts[i].first == page; ++i) {
                segments.push_back(parts[i].second);
                for (int plane = 0; plane < planes.count; ++plane)
                    segments.back().state[plane] =
                        frame + reinterpret_cast<intptr_t>(segments.back().state[plane]);
            }
        }
        if (!held.empty()) finish();
    } catch (...) {
        for (int64_t page : held) pool.release(page, false);
        throw;
    }
}

}  // namespace optim
}  // namespace peftcore
