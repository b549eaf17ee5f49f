// The rows of experts, and a loop over them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/check.h"

namespace peftcore {
namespace grouped {

// An expert and its rows, possibly none.
struct Group {
    int64_t expert, first, rows;
};

// The experts of `offsets`, [experts] int32 on the CPU, and the end of the last one's rows.
inline std::vector<Group> groups_of(const at::Tensor& offsets, int64_t rows, const char* op) {
    const at::Tensor ends = offsets.contiguous();
    const int32_t* end = ends.const_data_ptr<int32_t>();
    std::vector<Group> groups;
    int64_t begin = 0;
    for (int64_t e = 0; e < ends.size(0); begin = end[e++]) {
        TORCH_CHECK_VALUE(begin <= end[e] && end[e] <= rows, op, ": offsets must rise from 0 to ", rows,
                          ", found ", end[e], " at ", e);
        groups.push_back({e, begin, end[e] - begin});
    }
    return groups;
}

inline int64_t end_of(const std::vector<Group>& groups) {
    return groups.empty() ? 0 : groups.back().first + groups.back().rows;
}

// Calls `work` for each expert: first for those with so many rows that one thread would keep the others waiting, with
// all threads inside the call; then for the others, from many rows to few, as threads become free. The second argument
// of `work` is the expert that this thread will probably take next, or nullptr.
template <typename Work>
void for_each(std::vector<Group> groups, const Work& work) {
    std::stable_sort(groups.begin(), groups.end(),
                     [](const Group& a, const Group& b) { return a.rows > b.rows; });
    int64_t all = 0;
    for (const Group& group : groups) all += group.rows;
    const int64_t threads = at::get_num_threads();
    size_t begin = 0;
    const auto at = [&](size_t i) { return i < groups.size() && groups[i].rows != 0 ? &groups[i] : nullptr; };
    if (threads > 1)
        for (; begin < groups.size() && groups[begin].rows * 2 * threads > all; ++begin)
            work(groups[begin], at(begin + 1));
    std::atomic<size_t> next{begin};
    at::parallel_for(0, begin < groups.size() ? threads : 0, 1, [&](int64_t first, int64_t last) {
        // Dispatch guards are thread-local: those of the operator do not apply in this thread.
        const at::AutoDispatchBelowADInplaceOrView below;
        const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
        for (; first < last; ++first)
            for (size_t i = next++; i < groups.size(); i = next++)
                work(groups[i], at(next.load(std::memory_order_relaxed) + size_t(threads - 1)));
    });
}

}  // namespace grouped
}  // namespace peftcore
